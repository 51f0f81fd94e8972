"""What a batch of sequences holds: its state, its rows of the tables, and what it counts."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import SupportsInt

import torch
from torch import Tensor

from octavo.attention import FEW
from octavo.config import Eviction
from octavo.kv.answers import Answers
from octavo.kv.capture import Boundaries
from octavo.kv.lifetimes import Lifetimes
from octavo.kv.memory import Memory
from octavo.kv.quota import Quota
from octavo.kv.shape import CacheShape
from octavo.kv.state import Holding, State
from octavo.kv.step import Batch
from octavo.kv.tables import Index
from octavo.kv.within import knows_tails


class Held:
    """A batch of sequences as it is.

    `state`: which they are, and what the host knows of them. `budget` (bytes, None: no bound) is for these sequences
    alone. `undo`: a slot is taken again only so many tokens after its own has expired, so that as many of the newest
    tokens can be taken back.
    """

    def __init__(
        self, shape: CacheShape, eviction: Eviction | None, memory: Memory, budget: int | None = None, undo: int = 0
    ) -> None:
        self.shape, self.eviction, self.memory = shape, eviction, memory
        self.lifetimes = Lifetimes(shape.lifetimes, shape.device, shape.heads) if shape.windowed else None
        longest = self.lifetimes.longest if self.lifetimes else 0
        self.tables = memory.tables(shape.cached_layers, eviction.window if eviction else None, longest)
        self.undo = undo
        with self.tables.pool.lock:
            self.tables.reach_back(undo)
        self._holding = Holding()
        self.quota = Quota(budget, self.tables, self._holding)
        self._answers = Answers(shape.device)
        self._index: tuple[tuple[int, ...], Index] | None = None
        self._ids: tuple[tuple[int, ...], Tensor] | None = None
        memory.give_back_with(self, self.tables, self._holding)

    @property
    def state(self) -> State:
        """Which sequences these are, and what the host knows of them."""
        return self._holding.state

    @property
    def rows(self) -> tuple[int, ...]:
        """The sequences' rows of `tables`, in the batch's order."""
        return self.state.rows

    @property
    def seen(self) -> int:
        """Columns read, padding included."""
        return self.state.seen

    @property
    def real(self) -> Tensor | None:
        """Which columns seen are no padding, [B, seen] bool; None: all."""
        return self.state.real

    def padded_in_front(self, lead: Sequence[int]) -> None:
        """Take note that each sequence began with so many columns of padding, and has had no other."""
        self._holding.state = replace(self.state, lead=tuple(lead), padded=False)

    @property
    def boundaries(self) -> Boundaries:
        """What is kept for snapshots."""
        return self.state.boundaries

    @property
    def index(self) -> Index:
        """What selects these sequences' rows from the tables."""
        rows = self.rows
        if self._index is None or self._index[0] != rows:
            self._index = rows, self.tables.index(rows)  # a tensor on a GPU is not made again in every step
        return self._index[1]

    @property
    def row_ids(self) -> Tensor:
        """The same rows as numbers, int32 [B]."""
        if self._ids is None or self._ids[0] != self.rows:
            index = self.index
            if isinstance(index, slice):  # made on the device: a copy would wait for it
                ids = torch.arange(index.start, index.stop, dtype=torch.int32, device=self.shape.device)
            else:
                ids = index.int()
            self._ids = self.rows, ids
        return self._ids[1]

    @property
    def position(self) -> Tensor:
        """Tokens read by each sequence, int32 [B]: the next token's position."""
        back = self.state.back
        return (self.tables.position[self.index] if back is None else back.position).clone()

    @property
    def nbytes(self) -> int:
        """Bytes held for these sequences: the pages that they name, each counted once, their table rows, and what is
        kept for snapshots at boundaries."""
        return self._holding.nbytes + self.tables.nbytes_of(self.rows)

    @property
    def few(self) -> int:
        """Tokens of a forward up to which all survive it, so that one plan serves all of them (`DecodeStep`)."""
        return FEW if self.eviction is None else min(FEW, self.eviction.window)

    @property
    def shift(self) -> int:
        """See `Eviction`."""
        return self.eviction.shift if self.eviction else 0

    def passes_boundaries(self, valid: Tensor | None) -> bool:
        """Whether a forward with this padding may go past boundaries that are to be kept, and need not end there."""
        return valid is None and self.state.real is None and knows_tails(self.tables)

    def _passes(self, columns: int, valid: Tensor | None) -> tuple[int, ...]:
        """How far ahead the boundaries are that a forward of so many columns goes past."""
        ahead = sorted(p - self.seen for p in self.boundaries.wanted)
        return tuple(n for n in ahead if 0 < n < columns) if self.passes_boundaries(valid) else ()

    def columns_read(self) -> Tensor:
        """Which columns seen are no padding, [B, seen] bool."""
        return self.state.columns_read(self.shape.device)

    def _lost(self) -> Tensor:
        """Where sequences cannot be taken back to, nor before, since a token seen there is gone, int32 [B, L, H].

        Of what was handed on a position needs the token before it alone, which expires a window later.
        """
        lost = self.tables.lost[self.index]
        if self.shape.hands and self.eviction:
            lost = torch.cat([lost[:, :-1], lost[:, -1:] - self.eviction.window + 1], 1)
        return lost

    def _batch(self, longest: int, expired: bool, scattered: bool) -> Batch:
        """These sequences for a step; see there."""
        return Batch(
            self.tables, self.index, self.eviction, longest, expired, scattered, self.state.shared, self.quota,
            lifetimes=self.lifetimes, undo=self.undo,
        )  # fmt: skip

    def _reserve(self, claim: int, need: SupportsInt) -> None:
        self.quota.claim(claim, need)
        self.tables.pool.reserve(claim, need)

    def _end_all(self, boundaries: Boundaries) -> None:
        """End all sequences, inside a change."""
        state = self.state
        self._holding.state = State(boundaries=boundaries, epoch=state.epoch + 1)
        self.quota.forget()
        self.tables.leave(state.rows)

    def let_go(self, which: int, boundaries: Collection[int]) -> None:
        """Forget what was kept of one sequence at some boundaries (numbers of its tokens), which are needed no more."""
        with self.tables.pool.lock:
            left = self.boundaries.without(self.rows[which], boundaries)
            self._holding.state = replace(self.state, boundaries=left)

    def reach_back(self, tokens: int) -> None:
        """Let at least so many of the newest tokens be taken back from now on. No forward may run."""
        if tokens <= self.undo:
            return
        tables, state = self.tables, self.state
        with tables.pool.lock:
            tables.reach_back(tokens)
            if state.rows:  # marks may name slots that were free without it and have been taken
                tables.find_marks(self.index, tables.position[self.index])
            self.undo = tokens

    def adopt(self, boundaries: Boundaries) -> None:
        """Keep what another, empty batch was asked to keep."""
        self._holding.state = replace(self.state, boundaries=boundaries)
