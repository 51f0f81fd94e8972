"""The tail at a boundary that a chunk goes past, taken from pages and chunk before the chunk is stored.

A forward that ended at the boundary would cost one more pass over all layers, and what it would leave is there anyway:
what pages held before the chunk and a query at the boundary still sees, and the chunk's own tokens before it.
"""

from typing import TYPE_CHECKING

import torch

from octavo.config import NEVER
from octavo.kv.capture import Passed, expiring
from octavo.kv.ragged import merged, stacked
from octavo.kv.snapshot import Ragged
from octavo.kv.step import Batch, New
from octavo.kv.tables import Tables

if TYPE_CHECKING:
    from octavo.kv.chunk_step import Layers


def knows_tails(tables: Tables) -> bool:
    """Whether tails can be taken so: of slots that hold floats, where gates alone let tokens expire."""
    return not tables.pool.layout.quantised and tables.window is not None


class Within:
    """The tails at some boundaries of a chunk, `ahead` of its first token, of all its rows."""

    def __init__(self, batch: Batch, new: New, ahead: tuple[int, ...]) -> None:
        self.batch, self.new, self.ahead = batch, new, ahead
        self._parts: dict[tuple[int, int], dict[int, Ragged]] = {}  # by row of the batch and boundary, by first layer

    def take(self, chunk: "Layers") -> None:
        """Take what there is of some layers; before their tokens are stored."""
        for row, start in enumerate(self.new.start.tolist()):
            for ahead in self.ahead:
                self._parts.setdefault((row, ahead), {})[chunk.layers.start] = self._taken(chunk, row, start, ahead)

    def _taken(self, chunk: "Layers", row: int, start: int, ahead: int) -> Ragged:
        tables, end, shift = self.batch.tables, start + ahead, self.batch.shift
        at = self.batch.index, chunk.layers
        old = expiring(tables, tables.table[at][row], tables.length[at][row], end)
        expiry = chunk.expiry[row, ..., :ahead]
        some = (expiry >= end) & (expiry < NEVER)
        if shift:  # at the boundary the mark of the newest token is open
            expiry = expiry.clone()
            expiry[..., -1], some[..., -1] = NEVER, True
        layer, head, token = some.nonzero().unbind(1)
        key, value = (t[row][layer, head, token].to(tables.pool.layout.dtype) for t in (chunk.key, chunk.value))
        position, kept = (start + token).int(), expiry[layer, head, token]
        new = Ragged(some.sum(-1, dtype=torch.int32), position, key, value, expiry=kept)
        return merged([old, new])

    def tails(self, row: int) -> list[Passed]:
        """One row's tails, when all layers have been taken."""
        start, out = self.new.start[row], []
        for ahead in self.ahead:
            parts = self._parts[row, ahead]
            out.append(Passed(start + ahead, stacked([parts[layer] for layer in sorted(parts)])))
        return out
