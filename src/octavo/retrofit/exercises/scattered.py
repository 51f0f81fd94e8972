"""Exercises on what lies in several places of a text: facts, and variables that are set from one another."""

import numpy as np

from octavo.retrofit.exercises.item import Item, Turn, distinct, made_up, number, pick
from octavo.retrofit.exercises.reader import Reader

_FACTS = (
    ("The access number of {a} is {v}.", "What is the access number of {a}?", "The access number of {a} is {v}."),
    ("(Remember: {a} was given the key {v}.)", "Which key was {a} given?", "{a} was given the key {v}."),
    ("By the way, {a}'s ticket reads {v}.", "What does {a}'s ticket read?", "{a}'s ticket reads {v}."),
    ("{a} = {v}", "{a} = ?", "{a} = {v}"),
    ("Reference for {a}: {v}", "Give the reference for {a}.", "The reference for {a} is {v}."),
    ("To open the gate of {a}, type {v}.", "What has to be typed at the gate of {a}?", "Type {v}."),
)
_ALL = (
    "List the {n} of these: {names}.",
    "Give all {n} that were mentioned, in the order of the text.",
    "What are the {n} of {names}?",
)
_SEVERAL = ("The number that {a} uses is {v}.", "{a} wrote down {v}.", "Note for {a}: {v}.")
_CHAIN = (
    ("{a} = {b}", "What is the value of {a}?", "{v}"),
    ("VAR {a} = {b}", "Which value does the variable {a} have in the end?", "{a} has the value {v}."),
    ("let {a} = {b};", "After all of this, what is {a}?", "{a} is {v}."),
    ("Set {a} to {b}.", "What was {a} set to, followed through to its number?", "{v}"),
)
_NAMED = (
    "Which variables have the value {v}?",
    "Name all variables that are equal to {v}, in order.",
)


def facts(reader: Reader, rng: np.random.Generator) -> Item:
    """Three to eight facts of one wording with numbers or words as values, some of them asked for."""
    statement, question, answer = _FACTS[int(rng.integers(len(_FACTS)))]
    spoken = rng.random() < 0.25
    made = [
        (name.capitalize(), f"{made_up(rng)}-{made_up(rng)}" if spoken else number(rng, 3, 8))
        for name in distinct(rng, int(rng.integers(3, 9)))
    ]
    turns = []
    for which in rng.permutation(len(made))[: int(rng.integers(2, 5))]:
        a, v = made[int(which)]
        turns.append(Turn(question.format(a=a), v if rng.random() < 0.4 else answer.format(a=a, v=v)))
    return Item([statement.format(a=a, v=v) for a, v in made], turns)


def several(reader: Reader, rng: np.random.Generator) -> Item:
    """Two to five numbers in several places, asked for all at once."""
    statement = pick(rng, _SEVERAL)
    made = [(name.capitalize(), number(rng, 4, 7)) for name in distinct(rng, int(rng.integers(2, 6)))]
    names = ", ".join(a for a, _ in made)
    question = pick(rng, _ALL).format(n="numbers", names=names)
    listed = ", ".join(v for _, v in made) if rng.random() < 0.5 else "\n".join(f"{a}: {v}" for a, v in made)
    return Item([statement.format(a=a, v=v) for a, v in made], [Turn(question, listed)])


def variables(reader: Reader, rng: np.random.Generator) -> Item:
    """One or two chains of two to five variables, each set from the one before; values and names are asked for."""
    statement, question, answer = _CHAIN[int(rng.integers(len(_CHAIN)))]
    chains = []
    for _ in range(int(rng.integers(1, 3))):
        upper = rng.random() < 0.5
        names = [n.upper() if upper else n for n in distinct(rng, int(rng.integers(2, 6)))]
        chains.append((names, number(rng, 4, 6)))
    places = [(at + rng.random(), names, v, at) for names, v in chains for at in range(len(names))]
    bodies = [
        statement.format(a=names[at], b=names[at - 1] if at else v)
        for _, names, v, at in sorted(places, key=lambda p: p[0])
    ]
    turns = []
    for names, v in chains:
        last = names[int(rng.integers(1, len(names)))]
        turns.append(Turn(question.format(a=last), answer.format(a=last, v=v)))
        if rng.random() < 0.5:
            turns.append(Turn(pick(rng, _NAMED).format(v=v), ", ".join(names)))
    return Item(bodies, turns)
