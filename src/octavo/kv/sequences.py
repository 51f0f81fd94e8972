"""A batch of sequences: rows of one memory's tables that run forwards together, and join and leave one at a time.

A forward goes: `begin` (which new tokens there are), per layer the step's `update`, `attend` and `settle`, and after
the last layer `commit`. A forward that fails or is interrupted is taken back by `abandon`, wherever it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention import FEW
from octavo.config import Eviction
from octavo.errors import CacheStateError
from octavo.kv.capture import Boundaries, restore_into
from octavo.kv.chunk_step import ChunkStep
from octavo.kv.decode_step import DecodeStep
from octavo.kv.late import Late, capturing
from octavo.kv.memory import Memory, bookkeeping
from octavo.kv.quota import Quota
from octavo.kv.rewind import rewind
from octavo.kv.shape import CacheShape
from octavo.kv.snapshot import Snapshot
from octavo.kv.step import Batch

Step = DecodeStep | ChunkStep


@dataclass
class _Before:
    """What a forward began with, until all of it is done."""

    seen: int
    real: Tensor | None
    position: Tensor  # [B] int32
    chunk: ChunkStep | None = None  # knows what it has overwritten


class Sequences:
    """Sequences over the pages of a memory, each in a row of its own.

    `rows`: their rows of `tables`, in the batch's order. `seen`: columns read, padding included; `real` [B, seen] bool
    says which of them are no padding, None: all. `boundaries`: what is kept for snapshots. `budget` (bytes, None: no
    bound) is for these sequences alone.
    """

    def __init__(self, shape: CacheShape, eviction: Eviction | None, memory: Memory, budget: int | None = None) -> None:
        self.shape, self.eviction, self.memory = shape, eviction, memory
        self.tables = memory.tables(shape.cached_layers, eviction.window if eviction else None)
        self.rows: list[int] = []  # always this one list, which the finaliser knows
        self.boundaries = Boundaries()
        self.quota = Quota(budget, partial(self.tables.nbytes_of, self.rows), self.tables.pool.page_nbytes)
        self._late, self._left = Late(shape.device), Late(shape.device)
        self._clear()
        memory.give_back_with(self, self.tables, self.rows)

    def _clear(self) -> None:
        self.seen = 0
        self.real: Tensor | None = None
        self.step: Step | None = None  # the running forward
        self._index: tuple[tuple[int, ...], slice | Tensor] | None = None
        self._before: _Before | None = None
        self._longest = 0  # no row has more slots
        self._reserved = 0  # slots per row that a captured step may use
        self._cropped = False  # whether slots may be free inside rows for another reason than the window
        self._scattered = False  # whether slots may be free elsewhere than `Tables.marks` says
        self._epoch = 0  # moves on where what was asked about free slots before means nothing any more
        self._shared = False  # whether other sequences may name pages of these

    @property
    def index(self) -> slice | Tensor:
        """What selects these sequences' rows from the tables."""
        rows = tuple(self.rows)
        if self._index is None or self._index[0] != rows:
            self._index = rows, self.tables.index(rows)  # a tensor on a GPU is not made again in every step
        return self._index[1]

    @property
    def position(self) -> Tensor:
        """Tokens read by each sequence, int32 [B]: the next token's position."""
        return self.tables.position[self.index].clone()

    @property
    def nbytes(self) -> int:
        """Bytes held for these sequences: the pages that they name, each counted once, and their table rows."""
        own = 0 if self.real is None else self.real.numel()
        return own + self.tables.nbytes_of(self.rows)

    # One forward

    @bookkeeping
    def begin(self, batch: int, columns: int, valid: Tensor | None, trains: bool = False) -> Step:
        """Open a forward of `columns` tokens per sequence; `valid` [B, N] bool marks the real ones, None: all are.

        `trains`: gradients are wanted, which pages do not pass on. Whatever happens, `commit` or `abandon` ends it.
        Raises CacheBudgetError where the tokens have no room, and CacheStateError for what a CUDA graph cannot hold.
        """
        captured = capturing(self.shape.device)
        if captured and (self._reserved < self._longest + columns or self.real is not None or valid is not None):
            raise CacheStateError("call `reserve` before a step is captured in a CUDA graph, and pad nothing")
        self._before = None
        if not captured:
            self.memory.reclaim()
        if not self.rows:
            self.rows += self.tables.join(batch)
        self._before = before = _Before(self.seen, self.real, self.tables.position[self.index].clone())
        if not captured:
            self._learn()
        window = self.eviction.window if self.eviction else None
        few = columns <= FEW and (window is None or columns <= window) and not trains
        longest = self._reserved if captured else self._longest + columns if few else self._longest
        expired = self._cropped or (window is not None and (captured or self.seen + columns > window))
        state = Batch(
            self.tables, self.index, self.eviction, longest, expired, self._scattered, self._shared, self.quota
        )
        self._valid, self._columns = valid, columns
        if few:
            self.step = DecodeStep(state, columns, valid)
        else:
            self.step = before.chunk = ChunkStep(state, columns, valid, trains)
        return self.step

    def _learn(self) -> None:
        """Take in what the device has told since the last step."""
        for longest, seen in self._late.poll():
            self._longest = min(self._longest, longest + self.seen - seen)
        for left, epoch in self._left.poll():
            if epoch == self._epoch:
                self._scattered = left > 0

    @bookkeeping
    def commit(self, marked: Tensor | None = None) -> None:
        """End a forward that went well; `marked` [L, B, H, N] bool are the decisions of a `DecodeStep`'s tokens."""
        step = self.step
        assert step is not None
        step.commit(marked)
        if capturing(self.shape.device):
            self.step = self._before = None  # nothing has run yet; see `replayed`
            return
        real = self.real
        if real is not None or self._valid is not None:
            real = torch.cat([self.columns_read(), step.new.position >= 0], 1)
        self.seen, self.real, self.step = self.seen + self._columns, real, None
        self._longest += self._columns
        if isinstance(step, DecodeStep) and self._columns > 1 and self.eviction is not None:
            self._scatter()  # several tokens may have expired, of which `Tables.marks` names the last
        elif step.left is not None:
            self._scattered = True  # until the answer comes
            self._left.post(step.left, self._epoch)
        self._late.post(self.tables.length[self.index].amax(), self.seen)
        self._before = None  # until here `abandon` takes everything back
        if self.seen in self.boundaries.wanted:
            self.boundaries.reach(self.tables, self.rows, self.index, self._shift)

    def _scatter(self) -> None:
        """Note that slots may be free elsewhere than `Tables.marks` says."""
        self._scattered, self._epoch = True, self._epoch + 1

    @bookkeeping
    def abandon(self) -> None:
        """Take back a forward that failed or was interrupted, wherever it was; all is as it was before it."""
        self.step, before = None, self._before
        if before is None:
            return
        self.seen, self.real = before.seen, before.real
        self._late.forget()  # a reading may be of what is taken back
        if self.seen == 0:
            self._end_all()
            self.memory.pool.mend()
            self._before = None
            return
        index, chunk = self.index, before.chunk
        rewind(self.tables, index, before.position, self._shift, chunk.overwritten if chunk else ())
        if chunk is not None:
            self.tables.lost[index] = chunk.lost
        self._scatter()
        self.quota.forget()
        self._before = None

    @property
    def _shift(self) -> int:
        return self.eviction.shift if self.eviction else 0

    def columns_read(self) -> Tensor:
        """Which columns seen are no padding, [B, seen] bool."""
        if self.real is not None:
            return self.real
        return torch.ones(len(self.rows), self.seen, dtype=torch.bool, device=self.shape.device)

    # Steps that run without the host

    @bookkeeping
    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens of each sequence, for a decode step captured in a CUDA graph.

        Waits for the device. The captured step may be replayed `tokens` times; tell `replayed` how often. Raises
        CacheBudgetError where there is no room.
        """
        tables, S = self.tables, self.tables.pool.layout.page_size
        with tables.pool.lock:
            self._longest = int(tables.length[self.index].amax())
            self._reserved = self._longest + tokens
            tables.widen(self._reserved)
            claim = tables.length[self.index].numel() * -(-tokens // S)
            self.quota.claim(claim, torch.tensor(claim))
            tables.pool.reserve(claim, torch.tensor(claim))

    def replayed(self, steps: int) -> None:
        """Take note of `steps` tokens of each sequence that a CUDA graph has read meanwhile."""
        self.seen += steps
        self._longest += steps
        self._before = None
        self.tables.pool.post()

    # Joining and leaving

    @bookkeeping
    def take(self, other: "Sequences") -> None:
        """Take over all sequences of another batch, behind one's own; the other is empty then. Nothing is copied.

        The batch is as if the shorter sequences had been padded on the left. Raises CacheStateError where the other
        is not over the same memory in the same mode, or runs a forward.
        """
        if self.tables is not other.tables or self.eviction != other.eviction:
            raise CacheStateError("only sequences of one attached model in one mode can run as one batch")
        if other is self or self.step is not None or other.step is not None:
            raise CacheStateError("a batch cannot take over sequences while a forward runs, nor its own")
        seen = max(self.seen, other.seen)
        parts = [F.pad(s.columns_read(), (seen - s.seen, 0)) for s in (self, other) if s.rows]
        real = torch.cat(parts) if parts and (self.seen != other.seen or self._padded or other._padded) else None
        rows, longest = list(other.rows), max(self._longest, other._longest)
        flags = [a or b for a, b in zip(self._flags, other._flags, strict=True)]
        self.boundaries.take(other.boundaries, seen - self.seen if self.rows else 0, seen - other.seen)
        other.rows.clear()
        self.rows += rows
        self.seen, self.real, self._longest = seen, real, longest
        self._cropped, self._scattered, self._shared = flags
        self._changed()
        other.reset()

    @property
    def _padded(self) -> bool:
        return self.real is not None

    @property
    def _flags(self) -> tuple[bool, bool, bool]:
        return self._cropped, self._scattered, self._shared

    def _changed(self) -> None:
        """Forget readings that are of another set of rows."""
        self._late.forget()
        self._epoch += 1
        self.quota.forget()

    @bookkeeping
    def select(self, indices: Sequence[int]) -> None:
        """Keep the sequences at `indices`, in that order; a repeated one shares its pages with its copies.

        The others leave and their pages are given back; nothing of those that stay is moved.
        """
        tables, before = self.tables, list(self.rows)
        chosen: list[int] = []
        for i in indices:
            if before[i] in chosen:
                chosen.append(tables.fork(before[i]))
                self._shared = True
            else:
                chosen.append(before[i])
        self.rows[:] = chosen
        tables.leave([row for row in before if row not in chosen])
        self.boundaries.follow(before, [(row, before[i]) for row, i in zip(chosen, indices, strict=True)])
        self._changed()
        if not chosen:
            self._clear()
        elif self.real is not None:
            self.real = self.real[torch.as_tensor(indices, device=self.real.device)]

    @bookkeeping
    def fork(self) -> "Sequences":
        """The same sequences in a batch of their own, which shares all pages until one of them writes."""
        twin = Sequences(self.shape, self.eviction, self.memory, self.quota.budget)
        for row in self.rows:
            twin.rows.append(self.tables.fork(row))
            self._shared = True
        twin.seen, twin.real, twin._longest = self.seen, self.real, self._longest
        twin._cropped, twin._scattered, twin._shared = self._flags
        twin.boundaries = self.boundaries.fork(zip(twin.rows, self.rows, strict=True))
        return twin

    @bookkeeping
    def reset(self) -> None:
        """End all sequences and give their memory back; no boundary is to be kept any more."""
        self._end_all()
        self.boundaries.wanted.clear()

    def _end_all(self) -> None:
        gone = list(self.rows)
        self.rows.clear()
        if gone:
            self.tables.leave(gone)
        self.boundaries.forget()
        self._changed()
        self._clear()

    @bookkeeping
    def crop(self, columns: int) -> None:
        """Take the newest columns back: exact, or CacheStateError where what would be seen again is gone."""
        if columns == self.seen:
            self._end_all()
            return
        tables, index = self.tables, self.index
        now = tables.position[index] - self.columns_read()[:, -columns:].sum(1).int()
        if bool((tables.lost[index] >= now[:, None, None]).any()):
            raise CacheStateError(
                f"cannot crop back to position {int(now.min())}: tokens visible from there are already evicted"
            )
        rewind(tables, index, now, self._shift)
        self.boundaries.drop_after(dict(zip(self.rows, now.tolist(), strict=True)))
        if self.real is not None:
            self.real = self.real[:, :-columns]
        self.seen -= columns
        self._cropped = True
        self._scatter()
        self._late.forget()
        self.quota.forget()

    # Snapshots

    @bookkeeping
    def restore(self, snapshot: Snapshot, boundary: int) -> None:
        """Become the one sequence of a snapshot at a boundary; nothing may be held. Raises as `restore_into`."""
        assert not self.rows
        counts, S = snapshot.counts(boundary), self.tables.pool.layout.page_size
        pages = int(((counts + S - 1) // S).sum())
        try:
            self.memory.reclaim()
            self.rows += self.tables.join(1)
            self.quota.claim(pages, torch.tensor(pages))
            restore_into(self.tables, self.rows[0], snapshot, boundary)
        except BaseException:
            self._end_all()
            self.memory.pool.mend()
            raise
        self.seen, self._longest = boundary, int(counts.max())
