"""What exercises are made of: things to remember, what is asked about them, and made-up names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_ONSETS = "b br c cl d dr f g gr h j k l m n p pl qu r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea ou".split()
_CODAS = ["", "", "n", "l", "r", "s", "m", "th", "ck"]


@dataclass(frozen=True)
class Turn:
    """A question and its answer; an empty question stands for an answer that simply follows, in plain text."""

    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """Pieces to place in a text, in this order, and turns that may come once all of them have."""

    bodies: list[str]
    turns: list[Turn] = field(default_factory=list)


def made_up(rng: np.random.Generator, syllables: int | None = None) -> str:
    """A word that is none: `syllables` of them, two or three where None."""
    count = syllables or int(rng.integers(2, 4))
    return "".join(pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(count)) + pick(rng, _CODAS)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of several, all equally likely."""
    return options[int(rng.integers(len(options)))]


def number(rng: np.random.Generator, least: int = 2, most: int = 7) -> str:
    """A number of `least` to `most` digits."""
    digits = int(rng.integers(least, most + 1))
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def distinct(rng: np.random.Generator, count: int) -> list[str]:
    """`count` made-up words, no two alike."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[made_up(rng)] = None
    return list(words)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them; scripts with their own stops included."""
    parts = re.split(r"(?<=[.!?][\"'”’)])\s+|(?<=[.!?])\s+|(?<=[。！？])", text)
    return [part.strip() for part in parts if part.strip()]


def opening(text: str, words: int = 7) -> str:
    """The first words of a text, of its first line; of text without spaces the first characters."""
    line = text.strip().split("\n")[0].strip()
    parts = line.split(" ")
    return " ".join(parts[:words]) if len(parts) > 2 else line[: 6 * words]


def looks_like_code(text: str) -> bool:
    """Whether many lines are indented or end as lines of code do."""
    lines = [line for line in text.split("\n") if line.strip()]
    code = [line for line in lines if line[0] in " \t" or line.rstrip()[-1] in "{};:()[],=>"]
    return len(lines) > 3 and len(code) > 0.4 * len(lines)
