"""The tasks of the suite. Their wordings, formats and seeds are none of the training exercises'."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from octavo.retrofit.data import Source
from octavo.retrofit.exercises.item import distinct, looks_like_code, made_up, opening, sentences
from octavo.retrofit.exercises.reader import Reader
from octavo.retrofit.needles import CITIES, needle_cases
from octavo.retrofit.suite.cases import Asked, Case, CaseSet, Context, Metric, laid_out
from octavo.retrofit.suite.settings import LongSettings
from octavo.retrofit.suite.texts import SuiteTexts

SEED = 0x0C7A70  # apart from the seeds of training, whose generators are made from (seed, step, rank)
EARLY = 0.6  # what is asked for lies in this share of a text, so that the rest lies between it and the question
TRIES = 200
FACTS = "facts"
DEPTHS = tuple((i + 0.5) / 10 for i in range(10))  # of facts, in shares of the text before them
Maker = Callable[[Reader, np.random.Generator], Context]

_CITY = ("Quito", "Hanoi", "Turin", "Perth", "Malmo", "Dakar", "Izmir", "Busan", "Leeds", "Omaha", "Cusco", "Kyoto")
_PEOPLE = (
    "Alice Bruno Carmen Derek Esther Fatima George Hannah Isaac Julia Kevin Laura Martin Nadia Oscar Paula Ruben Sofia "
    "Thomas Ursula Victor Wendy Xavier Yvonne Arthur Bella Conrad Diana Edgar Fiona"
).split()
_LETTERS = "alpha beta gamma delta epsilon zeta kappa lambda sigma theta omega omicron".split()
_NAME = r"\b[^\W\d]\w{2,}\b"
_COLOURS = "red blue green white black brown orange purple silver golden".split()


def _early(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, EARLY))


def repeat(reader: Reader, rng: np.random.Generator, code: bool = False) -> Context:
    """Two passages of 150 to 300 tokens, each written out again."""
    passages = [_passage(reader, rng, 150, 300, code) for _ in range(2)]
    asked = [Asked(f"Recite in full what opens with these words: «{opening(p, 8)}»", "", (p,)) for p in passages]
    return Context([(_early(rng), p) for p in passages], asked)


def quote(reader: Reader, rng: np.random.Generator) -> Context:
    """Four sentences of a passage, found by words from their middle; their first words are given."""
    for _ in range(TRIES):
        passage = reader.passage(rng, 350, 500)
        found = [s for s in sentences(passage) if 9 <= len(s.split(" ")) <= 18 and "\n" not in s and len(s) < 240]
        if len(found) >= 4:
            break
    else:
        found = _made_sentences(rng)
        passage = " ".join(found)
    asked = []
    for which in rng.permutation(len(found))[:4]:
        words = found[int(which)].split(" ")
        at = int(rng.integers(3, len(words) - 4))
        phrase, given = " ".join(words[at : at + 4]), " ".join(words[:4])
        question = f"One sentence of the text has «{phrase}» in it. Recite that sentence."
        asked.append(Asked(question, given, (" " + " ".join(words[4:]),)))
    return Context([(_early(rng), passage)], asked)


def edit(reader: Reader, rng: np.random.Generator) -> Context:
    """Code written out again with another name in one line, which is given; the two lines after it count."""
    for _ in range(TRIES):
        code = _passage(reader, rng, 100, 220, code=True)
        lines = code.split("\n")
        places = [i for i in range(2, len(lines) - 3) if _editable(lines, i)]
        if places:
            break
    else:
        lines, places = [f"{name} = {i}" for i, name in enumerate(distinct(rng, 12))], [4]
        code = "\n".join(lines)
    at = places[int(rng.integers(len(places)))]
    names = re.findall(_NAME, lines[at])
    old, new = names[int(rng.integers(len(names)))], made_up(rng, 2)
    given = "\n".join([*lines[:at], re.sub(rf"\b{old}\b", new, lines[at])])
    question = (
        f"Show the code that opens with «{opening(code)}», but with {new} instead of {old} in the line "
        f"«{lines[at].strip()}»."
    )
    return Context(
        [(_early(rng), code)], [Asked(question, given, tuple("\n" + line for line in lines[at + 1 : at + 3]))]
    )


def _editable(lines: list[str], at: int) -> bool:
    """Whether a line has a name and stands there once, and the two after it say something but not too much."""
    after = [line.strip() for line in lines[at + 1 : at + 3]]
    fit = all(3 < len(line) < 70 for line in after) and len(lines[at]) < 120
    return fit and lines.count(lines[at]) == 1 and re.search(_NAME, lines[at]) is not None


def table(reader: Reader, rng: np.random.Generator, rows: int = 20) -> Context:
    """A table of 20 rows; three of them from their keys on, cell by cell."""
    names = [str(name) for name in rng.permutation(_PEOPLE)[:rows]]
    cells = [(str(rng.choice(_CITY)), str(rng.choice(_COLOURS)), str(rng.integers(100, 1000))) for _ in names]
    lines = [f"{name}; {'; '.join(cell)}" for name, cell in zip(names, cells, strict=True)]
    asked = [
        Asked(
            f"Recite the line of the table for {names[at]}.",
            f"{names[at]};",
            (f" {cells[at][0]};", f" {cells[at][1]};", f" {cells[at][2]}"),
        )
        for at in map(int, rng.permutation(rows)[:3])
    ]
    return Context([(_early(rng), "\n".join(["Name; Town; Paint; Units", *lines]))], asked)


def several(reader: Reader, rng: np.random.Generator) -> Context:
    """Five numbers at places all over the text, asked for one by one."""
    cities = [str(c) for c in rng.permutation((*CITIES, *_CITY))[:5]]
    values = [str(rng.integers(10_000, 100_000)) for _ in cities]
    bodies = [
        (float(rng.uniform(0, 0.95)), f"The special magic number for {c} is {v}. Remember it.")
        for c, v in zip(cities, values, strict=True)
    ]
    asked = [
        Asked(f"What is the special magic number for {c}?", f"The special magic number for {c} is ", (v,))
        for c, v in zip(cities, values, strict=True)
    ]
    return Context(bodies, asked)


def variables(reader: Reader, rng: np.random.Generator) -> Context:
    """Three numbers, each given to one name and passed on to a second; the way from there to the number counts."""
    names = [str(name) for name in rng.permutation(_LETTERS)[:6]]
    bodies, asked = [], []
    for first, second in zip(names[::2], names[1::2], strict=True):
        value = str(rng.integers(1_000, 10_000))
        early, late = sorted((float(rng.uniform(0, 0.9)), float(rng.uniform(0, 0.9))))
        bodies += [(early, f"{first} := {value}."), (late, f"{second} := {first}.")]
        question = f"Follow the assignments from {second} to its number."
        asked.append(Asked(question, f"{second} := ", (f"{first}.", f" {first} := {value}")))
    return Context(bodies, asked)


def _passage(reader: Reader, rng: np.random.Generator, least: int, most: int, code: bool = False) -> str:
    """A passage that opens with enough words to be known by; code has line breaks in it."""
    passage = ""
    for _ in range(TRIES):
        passage = reader.passage(rng, least, most)
        if len(passage) > 2 * least and (not code or looks_like_code(passage)):
            break
    return passage


def _made_sentences(rng: np.random.Generator) -> list[str]:
    """Sentences for texts that have none."""
    return [" ".join(distinct(rng, 12)).capitalize() + "." for _ in range(8)]


# By the name of the row: the task, whether it is on code, and what is reported of it.
TASKS: dict[str, tuple[Maker, bool, Metric]] = {
    "repeat prose": (repeat, False, "nll"),
    "repeat code": (partial(repeat, code=True), True, "nll"),
    "quote": (quote, False, "exact"),
    "edit": (edit, True, "exact"),
    "table": (table, False, "exact"),
    "several needles": (several, False, "exact"),
    "variables": (variables, False, "exact"),
}


def text_sets(texts: SuiteTexts, settings: LongSettings) -> Iterator[CaseSet]:
    """Pieces of every text, spread evenly over it and never overlapping, scored past `nll_from`."""
    named = {"books": texts.prose} | ({} if texts.code is None else {"code": texts.code}) | texts.others
    n = settings.nll_length
    for name, source in named.items():
        count = min(settings.texts, len(source.tokens) // n)
        starts = np.linspace(0, len(source.tokens) - n, count).astype(int)
        cases = [Case(source.tokens[s : s + n].astype(np.int64), [(settings.nll_from, n)]) for s in starts]
        yield CaseSet.of(name, "nll", cases)


def task_sets(tokenizer: Any, texts: SuiteTexts, settings: LongSettings) -> Iterator[CaseSet]:
    """Every task at every length; facts are one a context, as in `needles.py`.

    Raises ConfigError where a context does not fit into a length.
    """
    for number, (name, (maker, on_code, metric)) in enumerate(TASKS.items()):
        source = texts.code if on_code else texts.prose
        if source is None:
            continue
        for length in settings.lengths:
            rng = np.random.default_rng((SEED, settings.seed, number, length))
            yield CaseSet.of(name, metric, _cases(tokenizer, source, maker, rng, length, settings.cases))
    for length in settings.lengths:
        rng = np.random.default_rng((SEED, settings.seed, len(TASKS), length))
        ids, sizes = needle_cases(tokenizer, texts.prose.tokens, length, settings.cases, DEPTHS, rng)
        yield CaseSet(FACTS, length, "exact", ids, [[(length - size, length)] for size in sizes])


def _cases(
    tokenizer: Any, source: Source, maker: Maker, rng: np.random.Generator, length: int, count: int
) -> list[Case]:
    """Contexts of one task with `count` answers or a few more."""
    reader = Reader(tokenizer, [source])
    made: list[Case] = []
    while sum(len(case.spans) for case in made) < count:
        context = maker(reader, rng)
        made.append(laid_out(tokenizer, context, partial(reader.running, rng), length))
    return made
