"""Exercises that look something up: a row or cell of a table, a key in JSON, a place in a list."""

import json

import numpy as np

from octavo.retrofit.exercises.item import Item, Turn, distinct, made_up, number, pick, sentences
from octavo.retrofit.exercises.reader import Reader

_COLUMNS = ("price", "stock", "city", "code", "owner", "weight", "year", "status", "colour", "phone", "score", "size")
_KEYS = ("name", "id", "item", "title", "account")
_STATES = ("open", "closed", "pending", "shipped", "lost", "paid", "new", "draft")
_CELL = (
    "What is the {column} of {row}?",
    "Look up {row} in the table. Which {column} does it have?",
    "Give the {column} for {key} {row}.",
    "{column} of {row}:",
)
_ROW = (
    "Give the whole row for {row}.",
    "Write out the line of the table with {key} {row}.",
    "Copy the entry of {row} exactly.",
)
_ENTRY = ("Print the entry with {key} {row} as JSON.", "Which object has {key} {row}? Give all of it.")
_AFTER = ("What comes after {a} in the list?", "Which entry follows {a}?", "The list: what is the next one after {a}?")
_PLACE = ("What is number {n} of the list?", "Give entry {n}.", "Which one stands at place {n}?")
_WHOLE = ("Write the list again.", "Repeat all entries of the list in order.", "Continue the list from {a}.")


def _value(rng: np.random.Generator, column: str) -> str:
    if column in ("city", "owner", "colour"):
        return made_up(rng).capitalize()
    if column == "status":
        return pick(rng, _STATES)
    if column == "price":
        return f"{number(rng, 1, 3)}.{rng.integers(0, 100):02d}"
    return number(rng, 2, 6)


def _records(rng: np.random.Generator, most: int) -> tuple[str, list[str], list[dict[str, str]]]:
    """(the key's name, the other columns, rows)."""
    key = pick(rng, _KEYS)
    columns = [str(c) for c in rng.permutation(_COLUMNS)[: int(rng.integers(2, 6))]]
    rows = int(np.exp(rng.uniform(np.log(5), np.log(most))))
    names = [str(rng.integers(1000, 10**6)) if key in ("id", "account") else name for name in distinct(rng, rows)]
    return key, columns, [{key: name} | {c: _value(rng, c) for c in columns} for name in names]


def _table(rng: np.random.Generator, heads: list[str], rows: list[dict[str, str]]) -> tuple[str, list[str]]:
    """(the table in one of several formats, its rows as they stand in it)."""
    cells = [[row[h] for h in heads] for row in rows]
    kind = int(rng.integers(4))
    if kind == 0:
        lines = ["| " + " | ".join(line) + " |" for line in [heads, *cells]]
        return "\n".join([lines[0], "|" + " --- |" * len(heads), *lines[1:]]), lines[1:]
    if kind == 1:
        widths = [max(len(line[i]) for line in [heads, *cells]) + 2 for i in range(len(heads))]
        lines = ["".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [heads, *cells]]
    else:
        mark = ", " if kind == 2 else "\t"
        lines = [mark.join(line) for line in [heads, *cells]]
    return "\n".join(lines), lines[1:]


def table(reader: Reader, rng: np.random.Generator) -> Item:
    """A table of 5 to 40 rows, and cells and rows of it."""
    key, columns, rows = _records(rng, 40)
    text, lines = _table(rng, [key, *columns], rows)
    turns = []
    for which in rng.permutation(len(rows))[: int(rng.integers(2, 6))]:
        row, line = rows[int(which)], lines[int(which)]
        if rng.random() < 0.3:
            turns.append(Turn(pick(rng, _ROW).format(row=row[key], key=key), line))
        else:
            column = pick(rng, columns)
            asked = pick(rng, _CELL).format(row=row[key], key=key, column=column)
            turns.append(Turn(asked, _said(rng, f"The {column} of {row[key]} is", row[column])))
    return Item([text], turns)


def records(reader: Reader, rng: np.random.Generator) -> Item:
    """JSON with 5 to 20 objects, a list or an object of objects, and values and objects of it."""
    key, columns, rows = _records(rng, 20)
    nested = {row[key]: {c: row[c] for c in columns} for row in rows}
    text = json.dumps(nested if rng.random() < 0.4 else rows, indent=[None, 2][int(rng.integers(2))])
    turns = []
    for which in rng.permutation(len(rows))[: int(rng.integers(2, 5))]:
        row = rows[int(which)]
        if rng.random() < 0.3:
            turns.append(Turn(pick(rng, _ENTRY).format(row=row[key], key=key), json.dumps(row)))
        else:
            column = pick(rng, columns)
            asked = pick(rng, _CELL[:1] + _CELL[2:]).format(row=row[key], key=key, column=column)
            turns.append(Turn(asked, _said(rng, f"The {column} of {row[key]} is", row[column])))
    return Item([f"```json\n{text}\n```" if rng.random() < 0.5 else text], turns)


def listing(reader: Reader, rng: np.random.Generator) -> Item:
    """A list of made-up names or of lines of the text, and entries of it, or all."""
    count = int(rng.integers(6, 30))
    lines = [s.replace("\n", " ")[:120].strip() for s in sentences(reader.passage(rng, 200, 600))]
    entries = list(dict.fromkeys(line for line in lines if len(line) > 8))[:count]
    if len(entries) < 5 or rng.random() < 0.5:
        entries = [f"{a} {b}" for a, b in zip(distinct(rng, count), distinct(rng, count), strict=True)]
    numbered = rng.random() < 0.6
    shown = [f"{i}. {e}" if numbered else f"- {e}" for i, e in enumerate(entries, 1)]
    turns = []
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(entries) - 1))
        asked = rng.random()
        if asked < 0.4:
            turns.append(Turn(pick(rng, _AFTER).format(a=f'"{entries[at]}"'), entries[at + 1]))
        elif asked < 0.7 and numbered:
            turns.append(Turn(pick(rng, _PLACE).format(n=at + 1), entries[at]))
        else:
            question = pick(rng, _WHOLE)
            first = at + 1 if "{a}" in question else 0
            turns.append(Turn(question.format(a=f'"{entries[at]}"'), "\n".join(shown[first:])))
    return Item(["\n".join(shown)], turns)


def _said(rng: np.random.Generator, sentence: str, value: str) -> str:
    return value if rng.random() < 0.5 else f"{sentence} {value}."
