"""A piece of a prompt inside a CUDA graph: its layers attend, and what they made is left where the host finds it.

Only what comes before storing is in the graph. Which pages the tokens take depends on how many are kept, so storing is
done as for any other piece, once the graph has run. See `octavo.kv.chunk_step`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from octavo.attention import Scoring
from octavo.kv.newest import stored_before
from octavo.kv.tables import Tables

if TYPE_CHECKING:
    from octavo.attention.cuda.chunk import Span


class Made(NamedTuple):
    """What all layers made of new tokens."""

    key: Tensor  # [L, B, H, N, D]
    value: Tensor  # [L, B, H, N, D]
    marked: Tensor | None  # [L, B, H, N] bool, None: nothing expires

    def last(self, columns: int) -> "Made":
        """Those of the last columns."""
        first = self.key.shape[3] - columns
        marked = None if self.marked is None else self.marked[..., first:]
        return Made(self.key[..., first:, :], self.value[..., first:, :], marked)


class RecordedChunk:
    """The running step while a graph is captured; nothing of it changes tables or pages.

    `span`: where each sequence's tokens are among the columns, in front of which there is padding. `rows` [B] int64:
    their rows of the tables, whose slots they see too; None where nothing is cached.
    """

    decides_at_commit = False  # what a chunk forgets is decided layer by layer, before the layer attends

    def __init__(self, tables: Tables, window: int, span: "Span", rows: Tensor | None, made: Made) -> None:
        self.made, self.filled = made, 0
        self._pages, self._tables, self._rows = tables.pool.pages, tables, rows
        self._window, self._span = window, span
        self._held: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._past: tuple[Tensor, Tensor] | None = None
        if rows is not None:
            self._past = tables.table[rows], tables.length[rows]  # [B, L, H, M], [B, L, H]

    def update(self, layer: int, key: Tensor, value: Tensor, marked: Tensor | None = None) -> None:
        """Hold the new keys and values [B, H, N, D] of one layer, and leave a copy for the host."""
        self.filled += 1
        self._held[layer] = key, value, marked
        self.made.key[layer].copy_(key)
        self.made.value[layer].copy_(value)
        if self.made.marked is not None:
            assert marked is not None
            self.made.marked[layer].copy_(marked)

    def attend(self, layer: int, query: Tensor, scale: float, scoring: Scoring | None = None) -> Tensor:
        """Attention of the last n columns, [B, n, Hq, D]; `query` [B, Hq, n, D]."""
        from octavo.attention.cuda.chunk import attend

        key, value, marked = self._held[layer]
        past: tuple[Any, Any, Any] = (None, None, None)
        if self._past is not None:
            past = self._pages, self._past[0][:, layer], self._past[1][:, layer]
        return attend(query, key, value, self._span, scale, marked, self._window, *past, scoring)

    @property
    def valid(self) -> Tensor:
        """Which columns are tokens, [B, N] bool; the others are padding."""
        first, columns, _ = (n[:, None] for n in self._span)
        column = torch.arange(self.made.key.shape[3], device=first.device)
        return (column >= first) & (column < first + columns)

    def newest(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is stored in one layer of the token before each sequence's first new one, each [B, H, D] in `dtype`."""
        if self._rows is None:
            nothing = torch.zeros_like(self.made.key[layer, :, :, 0], dtype=dtype)
            return nothing, nothing
        return stored_before(self._tables, self._rows, layer, self._span.start, 0, dtype)

    def settle(self, *layers: int) -> None:
        """Nobody reads these layers' tokens any more; the graph may use their memory again."""
        for layer in layers:
            del self._held[layer]

    def commit(self, marked: Tensor | None) -> None:
        """Storing is the host's."""
