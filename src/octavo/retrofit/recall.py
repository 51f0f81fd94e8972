"""Chats about a text with facts hidden in it, so that gates learn to keep what may be asked for later.

Running text rarely asks for a detail from thousands of tokens ago, and chats do. Each sequence is a user message
with a text that has random facts strewn in, followed by questions about some of them with their answers.
The evaluation's needles (`needles.py`) use none of these wordings, so that it does not measure what was trained.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.retrofit.data import Source, encode

_NAMES = (
    "Ada Boris Clara Dmitri Elena Felix Greta Hugo Ines Jonas Katya Leon Mira Nils Olga Petra Quentin Rosa Stefan Tilda"
).split()
_THINGS = (
    "locker garden ferry lantern archive cellar workshop orchard chapel engine library stable harbour vault mill"
).split()
_WORDS = (
    "amber birch cobalt dune ember fjord granite hazel indigo juniper kelp larch maple nectar onyx pearl quartz"
).split()

# (statement, question, beginning of the answer); {a} and {b} name the fact, {v} is its value.
_WORDINGS = [
    ("{a}'s {b} code is {v}.", "What is {a}'s {b} code?", "{a}'s {b} code is"),
    (
        "Note that the {b} of {a} has the number {v}.",
        "Which number has the {b} of {a}?",
        "The {b} of {a} has the number",
    ),
    (
        "The password that {a} chose for the {b} is {v}.",
        "Which password did {a} choose for the {b}?",
        "The password is",
    ),
    ("In the {b}, {a} counted {v} coins.", "How many coins did {a} count in the {b}?", "In the {b}, {a} counted"),
    ("The ribbon that {a} left in the {b} is called {v}.", "What is {a}'s ribbon in the {b} called?", "It is called"),
]
_INSTRUCTIONS = [
    "Here is a text. Answer the question after it.",
    "Please read this carefully, I will ask about details.",
    "Use the following document to answer.",
    "I pasted some pages of a book below.",
]


def recall_sequence(
    tokenizer: Any, text: Source, rng: np.random.Generator, length: int, facts: int = 24, questions: int = 10
) -> npt.NDArray[np.int64]:
    """One chat of exactly `length` tokens about a piece of `text`: [length] int64."""
    made = [_fact(rng) for _ in range(facts)]
    asked = [made[i] for i in rng.permutation(facts)[:questions]]
    opening, between, closing = chat_frame(tokenizer, str(rng.choice(_INSTRUCTIONS)))
    tail: list[int] = []
    for i, (_, question, answer, value) in enumerate(asked):
        asks = encode(tokenizer, ("\n\n" if i == 0 else "") + question)
        tail += (asks if i == 0 else [*closing, *asks]) + [*between, *encode(tokenizer, f"{answer} {value}.")]
    tail += closing[:1]
    statements = [encode(tokenizer, f" {fact[0]} ") for fact in made]
    room = length - len(opening) - len(tail) - sum(map(len, statements))
    if room < 16:
        return (
            recall_sequence(tokenizer, text, rng, length, facts // 2, max(1, questions // 2))
            if facts > 1
            else text.draw(rng, length)
        )
    body = text.draw(rng, room)
    places = np.sort(rng.integers(0, room, facts))
    pieces: list[npt.NDArray[np.int64]] = [np.array(opening, dtype=np.int64)]
    at = 0
    for place, statement in zip(places, statements, strict=True):
        pieces += [body[at:place], np.array(statement, dtype=np.int64)]
        at = place
    pieces += [body[at:], np.array(tail, dtype=np.int64)]
    return np.concatenate(pieces)


def _fact(rng: np.random.Generator) -> tuple[str, str, str, str]:
    """(statement, question, beginning of the answer, value)."""
    wording = _WORDINGS[int(rng.integers(len(_WORDINGS)))]
    digits = str(rng.integers(10 ** int(rng.integers(2, 8)), 10**8))[: int(rng.integers(3, 9))]
    words = f"{rng.choice(_WORDS)}-{rng.choice(_WORDS)}"
    spoken = "ribbon" in wording[0] or ("password" in wording[0] and rng.random() < 0.5)
    value = words if spoken else digits
    names = {"a": str(rng.choice(_NAMES)), "b": str(rng.choice(_THINGS)), "v": value}
    return wording[0].format(**names), wording[1].format(**names), wording[2].format(**names), value


def chat_frame(tokenizer: Any, instruction: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids (before a text, between question and answer, between answer and the next question) of a chat.

    Of plain text where the tokenizer has no chat template, or one that rewrites contents.
    """
    mark = "\x00"
    chat = [{"role": role, "content": mark} for role in ("user", "assistant", "user")]
    has_template = tokenizer.chat_template is not None
    parts = tokenizer.apply_chat_template(chat, tokenize=False).split(mark) if has_template else []
    if len(parts) != 4:
        return encode(tokenizer, instruction + "\n"), encode(tokenizer, "\nAnswer: "), encode(tokenizer, "\nQuestion: ")
    return encode(tokenizer, parts[0] + instruction + "\n\n"), encode(tokenizer, parts[1]), encode(tokenizer, parts[2])
