"""Rows of a fixed length without waste: whole documents laid one after another, each attending only to itself.

A share of the mix is about that share of its tokens, two or three points off. Documents longer than a row are cut
anywhere and fill a row alone; shorter ones go into the first row with room, and when none has any, the row with the
most room takes as much as fits. What is drawn depends only on the generator.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.retrofit.data import Source
from octavo.retrofit.exercises import exercise_sequence
from octavo.retrofit.recall import recall_sequence

Ids = npt.NDArray[np.int64]
SMALLEST = 16  # tokens; a shorter rest of a long row is padded, since so short a piece of text teaches nothing


@dataclass(frozen=True)
class Rows:
    """`tokens` and RoPE `positions` [B, T] int64; `document` [B, T] int32, -1 is padding; None: one document a row."""

    tokens: Tensor
    positions: Tensor
    document: Tensor | None

    @property
    def counted(self) -> Tensor:
        """[B, T] float32: 1 where there is a token, 0 where there is padding."""
        return (
            torch.ones_like(self.tokens, dtype=torch.float32) if self.document is None else (self.document >= 0).float()
        )

    def split(self, size: int) -> Iterator["Rows"]:
        """Parts of `size` rows; those without a boundary between documents have no `document`."""
        for i in range(0, len(self.tokens), size):
            part = slice(i, i + size)
            document = None if self.document is None else self.document[part]
            if document is not None and not document.any():
                document = None
            yield Rows(self.tokens[part], self.positions[part], document)

    def to(self, device: torch.device) -> "Rows":
        """The same rows elsewhere."""
        document = None if self.document is None else self.document.to(device)
        return Rows(self.tokens.to(device), self.positions.to(device), document)


def unbroken(tokens: Ids) -> Rows:
    """Rows [B, T] of one document each."""
    ids = torch.from_numpy(tokens)
    return Rows(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


class Packer:
    """Draws documents of a mix of sources, recall chats about the first of them and exercises on all, into rows."""

    def __init__(
        self, sources: list[Source], tokenizer: Any, recall: float, length: int, exercises: float = 0.0
    ) -> None:
        self.sources, self.tokenizer, self.length = sources, tokenizer, length
        # Documents are drawn in proportion to their length where they are cut, else equally: all tokens alike.
        lengths = [np.diff(source.bounds) for source in sources]
        self._cumulative = [np.maximum(1.0, n / length).cumsum() for n in lengths]
        means = [len(s.tokens) / c[-1] for s, c in zip(sources, self._cumulative, strict=True)]
        shares = np.array([source.share for source in sources]) / sum(source.share for source in sources)
        made = (self._shortest + length) / 2
        wanted = np.array([recall, *(shares * (1 - recall - exercises)), exercises])
        self._kinds = np.maximum(0.0, wanted) / np.array([made, *means, made])
        self._kinds /= self._kinds.sum()

    @property
    def _shortest(self) -> int:
        """Recall chats and exercises are this long at least, a row at most."""
        return max(1, self.length // 4)

    def rows(self, rng: np.random.Generator, count: int) -> Rows:
        """`count` rows, those of a single document first."""
        filled: list[list[Ids]] = [[] for _ in range(count)]
        room = np.full(count, self.length)
        least = min(SMALLEST, self.length // 64)
        while (room > least).any():
            document = self._draw(rng)
            fits = np.flatnonzero(room >= len(document))
            row = int(fits[0] if len(fits) else room.argmax())
            filled[row].append(document[: room[row]])
            room[row] -= len(filled[row][-1])
        filled.sort(key=len)
        return _joined(filled, self.length)

    def _draw(self, rng: np.random.Generator) -> Ids:
        """One document, or a row's length of one that is longer."""
        kind = int(rng.choice(len(self._kinds), p=self._kinds))
        if kind in (0, len(self.sources) + 1):
            length = int(rng.integers(self._shortest, self.length + 1))
            if kind:
                return exercise_sequence(self.tokenizer, self.sources, rng, length)
            return recall_sequence(self.tokenizer, self.sources[0], rng, length)
        source, cumulative = self.sources[kind - 1], self._cumulative[kind - 1]
        which = int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))
        first, last = source.bounds[which], source.bounds[which + 1]
        if last - first > self.length:
            first = int(rng.integers(first, last - self.length + 1))
        return source.tokens[first : min(last, first + self.length)].astype(np.int64)


def _joined(filled: list[list[Ids]], length: int) -> Rows:
    tokens = np.zeros((len(filled), length), dtype=np.int64)
    positions = np.zeros_like(tokens)
    document = np.full(tokens.shape, -1, dtype=np.int32)
    for row, documents in enumerate(filled):
        at = 0
        for i, ids in enumerate(documents):
            part = slice(at, at + len(ids))
            tokens[row, part], positions[row, part], document[row, part] = ids, np.arange(len(ids)), i
            at += len(ids)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(document))
