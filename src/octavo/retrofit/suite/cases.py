"""A case: tokens with the spans in them that count. Contexts are laid out here: text with things to remember in it,
and questions with their answers after it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.retrofit.data import encode
from octavo.retrofit.recall import chat_frame

Ids = npt.NDArray[np.int64]
Metric = Literal["nll", "exact", "same"]


@dataclass(frozen=True)
class Case:
    """Tokens [n] int64 and the spans [first, last) in it that count; every span is an answer."""

    ids: Ids
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class CaseSet:
    """Cases of one kind and one length: `ids` [N, length] int64, `spans` of each, and what is reported of them."""

    name: str
    length: int
    metric: Metric
    ids: Tensor
    spans: list[list[tuple[int, int]]]

    @staticmethod
    def of(name: str, metric: Metric, cases: Sequence[Case]) -> "CaseSet":
        """Cases of equal length as one set."""
        ids = torch.from_numpy(np.stack([case.ids for case in cases]))
        return CaseSet(name, ids.shape[1], metric, ids, [case.spans for case in cases])


@dataclass(frozen=True)
class Asked:
    """A question, the words that the answer begins with, which are given, and the rest, which counts.

    The rest may have several parts, such as cells or lines, each of which counts as an answer of its own.
    """

    question: str
    given: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """Pieces of text with their depths in [0, 1], and what is asked after all of it."""

    bodies: list[tuple[float, str]]
    asked: list[Asked]


def laid_out(
    tokenizer: Any, context: Context, filler: Callable[[int], Ids], length: int, instruction: str = "Here is a text."
) -> Case:
    """A chat of exactly `length` tokens, plain text where the tokenizer has no chat template.

    `filler(n)` gives n tokens of running text. Raises ConfigError where the context does not fit.
    """
    opening, between, closing = chat_frame(tokenizer, instruction)
    bodies = sorted(context.bodies, key=lambda body: body[0])
    pieces = [encode(tokenizer, f"\n\n{text}\n\n" if len(text) > 60 else f" {text} ") for _, text in bodies]
    tail: list[int] = []
    spans = []
    for i, each in enumerate(context.asked):
        tail += encode(tokenizer, f"\n\n{each.question}" if i == 0 else each.question) + between
        tail += encode(tokenizer, each.given) if each.given else []
        for part in each.parts:
            answer = encode(tokenizer, part)
            spans.append((len(tail), len(tail) + len(answer)))
            tail += answer
        tail += closing if i + 1 < len(context.asked) else []
    room = length - len(opening) - len(tail) - sum(map(len, pieces))
    if room < 0:
        raise ConfigError(f"a case of the suite needs {length - room:,} tokens; lengths of {length:,} are too short")
    text = filler(room) if room else np.zeros(0, dtype=np.int64)
    parts: list[Ids] = [np.array(opening, dtype=np.int64)]
    at = 0
    for (depth, _), piece in zip(bodies, pieces, strict=True):
        parts += [text[at : int(depth * room)], np.array(piece, dtype=np.int64)]
        at = int(depth * room)
    ids = np.concatenate([*parts, text[at:], np.array(tail, dtype=np.int64)])
    first = length - len(tail)
    return Case(ids, [(first + a, first + b) for a, b in spans])
