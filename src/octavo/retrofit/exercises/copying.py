"""Exercises that copy: repeat a passage, quote a sentence of it, continue it, or write it out with one change."""

import re

import numpy as np

from octavo.retrofit.exercises.item import Item, Turn, made_up, opening, pick, sentences
from octavo.retrofit.exercises.reader import Reader

SHORTEST, LONGEST = 80, 700  # tokens of a passage

_REPEAT = (
    'Repeat the passage that begins with "{a}" word for word.',
    'Please write out again, exactly, the text starting with "{a}".',
    'Copy the part that starts "{a}" without changing anything.',
    "Above there is a passage that opens like this: {a}\nGive it to me verbatim.",
    "I need the whole of this one again, unchanged: {a} ...",
    'Reproduce the section beginning "{a}".',
)
_REPEAT_PLAIN = (
    "The passage again:",
    "Verbatim:",
    "As it was written above:",
    "Copy of the text that begins with '{a}':",
    "",
    "",
    "---",
)
_QUOTE = (
    'Quote the sentence that contains "{a}".',
    'Which sentence has the words "{a}"? Give it exactly.',
    'Find "{a}" in the text and write down the full sentence.',
    "Cite word for word the sentence in which this stands: {a}",
)
_CONTINUE = (
    "Continue the passage from above after these words: {a}",
    'How does the text go on after "{a}"?',
    'Complete it as it stands in the text: "{a}"',
    "What comes directly after this?\n{a}",
)
_RENAME = (
    "Rename `{old}` to `{new}` everywhere in the code that begins with `{a}` and print the result.",
    "Write the code starting with `{a}` again, with {new} in place of {old}.",
    'Replace every "{old}" by "{new}" in the part that starts "{a}" and give me the whole of it.',
    "Take what begins with\n{a}\nand change the name {old} into {new}. Show all lines.",
)
_DROP = (
    "Remove the line `{line}` from the code that begins with `{a}` and print the rest.",
    "Write out what starts with `{a}` once more, but leave out this line:\n{line}",
)
_LEAD = ("", "", "", "Here it is:\n\n", "Sure:\n\n", "Certainly. ")
_COMMON = frozenset("the and for that with this from not but are was has have you his her its self return".split())


def repeat(reader: Reader, rng: np.random.Generator) -> Item:
    """A passage, and all of it again; one time in four twice."""
    text = reader.passage(rng, SHORTEST, LONGEST)
    turns = [Turn(pick(rng, _REPEAT).format(a=opening(text, int(rng.integers(5, 10)))), pick(rng, _LEAD) + text)]
    return Item([text], turns * (2 if rng.random() < 0.25 else 1))


def repeat_plainly(reader: Reader, rng: np.random.Generator) -> Item:
    """A passage that comes again after a heading or none, as it does in running text."""
    text = reader.passage(rng, SHORTEST, LONGEST)
    heading = pick(rng, _REPEAT_PLAIN).format(a=opening(text))
    return Item([text], [Turn("", f"{heading}\n\n{text}" if heading else text)])


def quote(reader: Reader, rng: np.random.Generator) -> Item:
    """A passage, and one or two of its sentences found by some of their words; lines where it has no sentences."""
    text = reader.passage(rng, SHORTEST, LONGEST)
    found = [s for s in sentences(text) if 20 <= len(s) <= 600]
    if len(found) < 3:
        found = [line.strip() for line in text.split("\n") if len(line.strip()) >= 12]
    if not found:
        return repeat(reader, rng)
    turns = []
    for which in rng.permutation(len(found))[: int(rng.integers(1, 3))]:
        sentence = found[int(which)]
        asked = pick(rng, _QUOTE).format(a=_phrase(sentence, rng))
        turns.append(Turn(asked, f'"{sentence}"' if rng.random() < 0.3 else sentence))
    return Item([text], turns)


def go_on(reader: Reader, rng: np.random.Generator) -> Item:
    """A passage, and its rest from some words in it."""
    text = reader.passage(rng, SHORTEST, LONGEST)
    spaces = [m.start() for m in re.finditer(r"\s+", text)]
    if len(spaces) < 20:
        return repeat(reader, rng)
    at = int(rng.integers(8, max(9, len(spaces) * 2 // 3)))
    given, rest = text[spaces[max(0, at - int(rng.integers(6, 14)))] : spaces[at]].strip(), text[spaces[at] :].strip()
    return Item([text], [Turn(pick(rng, _CONTINUE).format(a=given), rest)])


def edit(reader: Reader, rng: np.random.Generator) -> Item:
    """Code, or a passage where the text has no code, and all of it with a name or a line changed."""
    text = reader.code(rng, SHORTEST, LONGEST) or reader.passage(rng, SHORTEST, LONGEST)
    fenced = f"```\n{text}\n```" if rng.random() < 0.5 else text
    lines = [line for line in text.split("\n") if len(line.strip()) > 8]
    if rng.random() < 0.25 and len(lines) > 4:
        line = lines[int(rng.integers(1, len(lines)))]
        question = pick(rng, _DROP).format(line=line.strip(), a=opening(text))
        changed = text.replace(line + "\n", "", 1) if line + "\n" in text else text.replace("\n" + line, "", 1)
    else:
        names = re.findall(r"\b[^\W\d]\w{2,}\b", text)
        known = sorted({name for name in names if names.count(name) > 1 and name.lower() not in _COMMON})
        if not known:
            return repeat(reader, rng)
        old, new = pick(rng, known), made_up(rng)
        question = pick(rng, _RENAME).format(old=old, new=new, a=opening(text))
        changed = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return Item([fenced], [Turn(question, f"```\n{changed}\n```" if fenced != text else changed)])


def _phrase(sentence: str, rng: np.random.Generator) -> str:
    """A few words of a sentence, or characters where it has hardly any spaces."""
    words = sentence.split(" ")
    if len(words) < 4:
        at = int(rng.integers(0, max(1, len(sentence) - 12)))
        return sentence[at : at + 12]
    count = min(int(rng.integers(3, 6)), len(words) - 1)
    at = int(rng.integers(0, len(words) - count + 1))
    return " ".join(words[at : at + count])
