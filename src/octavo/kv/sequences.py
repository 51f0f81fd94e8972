"""A batch of sequences: rows of one memory's tables that run forwards together, and join and leave one at a time.

A forward goes: `begin` (which new tokens there are), per layer the step's `update`, `attend` and `settle`, and after
the last layer `commit`. A forward that fails or is interrupted is taken back by `abandon`, wherever it was.

Every operation changes the tables first and then replaces the batch's `State` in one assignment, or the other way round
where it gives something up. An interrupt before that assignment leaves what was, one after it what is to be.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from octavo.attention import cuda
from octavo.errors import CacheStateError
from octavo.kv.capture import Boundaries
from octavo.kv.captured import check_captured, promised, replayed
from octavo.kv.chunk_step import ChunkStep
from octavo.kv.decode_step import DecodeStep
from octavo.kv.fused_step import FusedStep, Replayed, reserve_for
from octavo.kv.held import Held
from octavo.kv.late import capturing
from octavo.kv.memory import bookkeeping
from octavo.kv.plan import named_elsewhere
from octavo.kv.pool import pages_for
from octavo.kv.quota import Quota
from octavo.kv.recorded_chunk import RecordedChunk
from octavo.kv.restoring import Stretch, restore_into
from octavo.kv.rewind import cut, pages_to_own, restore_overwritten, rewind
from octavo.kv.snapshot import Ragged, SnapshotLayout, counted
from octavo.kv.state import Back, State, cropped, joined, selected
from octavo.kv.step import Batch, New

Step = DecodeStep | FusedStep | ChunkStep
WIDER = 4096  # slots by which rows grow where a graph holds their addresses


class Sequences(Held):
    """Sequences over the pages of a memory, each in a row of its own, which run forwards together."""

    step: Step | Replayed | RecordedChunk | None = None  # the running forward

    # One forward

    @bookkeeping
    def begin(self, batch: int, columns: int, valid: Tensor | None, trains: bool = False) -> Step:
        """Open a forward of `columns` tokens per sequence; `valid` [B, N] bool marks the real ones, None: all are.

        `trains`: gradients are wanted, which pages do not pass on. Whatever happens, `commit` or `abandon` ends it.
        Raises CacheBudgetError where the tokens have no room, and CacheStateError for what a CUDA graph cannot hold.
        """
        captured = capturing(self.shape.device)
        self.settle()
        promise = check_captured(self.state, columns, valid) if captured else None
        if not captured:
            self.memory.reclaim()
        window = self.eviction.window if self.eviction else None
        passes = self._passes(columns, valid)
        few = columns <= self.few and not (trains or passes)
        state, back = self._open(batch, columns, captured)
        longest = promise.slots if promise else state.longest if few else back.longest
        windowed = self.lifetimes is not None
        expired = state.cropped or windowed or (window is not None and (captured or state.seen + columns > window))
        given = self._batch(longest, expired, state.scattered or windowed)
        self._valid, self._columns = valid, columns
        if few and columns == 1 and cuda.available(self.shape.device) and not windowed:
            self.step = FusedStep(given, self._running(valid), self.tables.flags[int(state.scattered)])
        elif few:
            self.step = DecodeStep(given, columns, valid)
        else:
            self.step = back.chunk = ChunkStep(given, columns, valid, trains, passes)
        return self.step

    @property
    def new(self) -> New:
        """The new tokens of the running forward."""
        assert isinstance(self.step, Step | Replayed)
        return self.step.new

    def _running(self, valid: Tensor | None) -> Tensor:
        """Which rows have a token in a step of one column, int32 [B], -1 where it is padding."""
        return self.row_ids if valid is None else torch.where(valid[:, 0], self.row_ids, -1)

    def _open(self, batch: int, columns: int, captured: bool) -> tuple[State, Back]:
        """Give new sequences their rows, and note where all must be taken back to unless `commit` is reached."""
        tables = self.tables
        with tables.pool.lock, tables.pool.changing():
            state = self.state if captured else self._answers.known(self.state)
            rows, lead = state.rows or tuple(tables.join(batch)), state.lead or (0,) * batch
            position = tables.position[self.index if state.rows else tables.index(rows)].clone()
            back = Back(position, state.longest)
            longest = state.longest + (0 if captured else columns)
            state = replace(state, rows=rows, lead=lead, longest=longest, back=back)
            if captured and state.promise is not None:
                state = replace(state, promise=state.promise._replace(generation=tables.generation))
            self._holding.state = state
        return state, back

    @bookkeeping
    def commit(self, marked: Tensor | None = None) -> None:
        """End a forward that went well; `marked` [L, B, H, N] bool are the decisions of a `DecodeStep`'s tokens."""
        step, state = self.step, self.state
        assert isinstance(step, Step | Replayed)
        step.commit(marked)
        if capturing(self.shape.device):  # nothing has run yet; see `replayed`
            self._holding.state = replace(state, back=None)
        else:
            with self.tables.pool.lock:
                self._holding.state = self._after(step)  # until here `abandon` takes everything back
        self.step = None

    def _after(self, step: Step | Replayed) -> State:
        """The state after a step; asks the device what the next steps want to know."""
        state, tables, seen = self.state, self.tables, self.state.seen + self._columns
        several = isinstance(step, DecodeStep) and self._columns > 1 and self.eviction is not None
        self._answers.ask(tables, self.index, state, seen, None if several else step.left)
        real, boundaries = state.real, state.boundaries
        if real is not None or self._valid is not None:
            real = torch.cat([self.columns_read(), step.new.position >= 0], 1)
        if isinstance(step, ChunkStep) and step.within is not None:
            boundaries = boundaries.passed({row: step.within.tails(i) for i, row in enumerate(self.rows)})
        if seen in boundaries.wanted:
            boundaries = boundaries.reached(tables, self.rows, self.index, self.shift)
        return replace(
            state,
            seen=seen,
            real=real,
            padded=state.padded or self._valid is not None,
            # Several may have expired, of which `marks` names the last; what is left over the device will tell.
            scattered=state.scattered or several or step.left is not None,
            scatters=state.scatters + several,
            boundaries=boundaries,
            back=None,
        )

    @bookkeeping
    def abandon(self) -> None:
        """Take back a forward that failed or was interrupted, wherever it was; all is as it was before it.

        Where that fails too (there is no memory to compute with), whatever is done next with these sequences begins
        with it, and the error of the forward is not hidden by another.
        """
        self.step = None
        with suppress(Exception):
            self.settle()

    def settle(self) -> None:
        """Finish taking back what was begun: every operation begins with it."""
        state = self.state
        back = state.back
        if back is None:
            return
        self.step = None
        pool = self.tables.pool
        with pool.lock, pool.changing():
            if state.seen == 0:
                self._end_all(state.boundaries.forgotten())
                return
            tables, index = self.tables, self.index
            if back.chunk is not None:
                restore_overwritten(tables, index, back.chunk.overwritten)
                tables.lost[index] = back.chunk.lost
            rewind(tables, index, cut(tables, index, back.position, self.shift), self._reserve)
            self.quota.forget()
            self._holding.state = replace(state, longest=back.longest, back=None, scattered=True, epoch=state.epoch + 1)

    # Steps that run without the host

    def begin_capture(self, rows: Tensor, search: Tensor) -> Replayed:
        """Open a decode step while a CUDA graph is captured, to be run again by `begin_replay`.

        `rows` [B] int32 and `search` [] int32 are what the graph reads then.
        """
        quota = Quota(None, self.tables, self._holding)
        given = Batch(
            self.tables, slice(0, len(rows)), self.eviction, 0, True, True, False, quota, claims=False, undo=self.undo
        )
        self.step = step = FusedStep(given, rows, search)
        return Replayed(step)

    @bookkeeping
    def make_room(self, columns: int = 1) -> None:
        """Make tables wide enough for so many more tokens, and for many more where they are not."""
        self.settle()
        tables, longest = self.tables, self.state.longest + columns
        with tables.pool.lock:
            tables.pool.settle()
            if longest > tables.table.shape[3] * tables.pool.layout.page_size:
                tables.widen(longest + WIDER)

    @bookkeeping
    def begin_replay(self, step: Replayed, valid: Tensor | None) -> None:
        """Open a forward of one column, which a CUDA graph runs; `commit` or `abandon` ends it. See `begin`."""
        self.settle()
        self.memory.reclaim()
        state, _ = self._open(len(self.rows), 1, captured=False)
        tables, scattered = self.tables, state.scattered
        given = self._batch(state.longest, True, scattered)
        with tables.pool.lock, tables.pool.changing():
            reserve_for(given, len(self.rows))
        step.prepare(self._running(valid), tables.flags[int(scattered)], scattered)
        self._valid, self._columns, self.step = valid, 1, step

    @bookkeeping
    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens of each sequence, for a decode step captured in a CUDA graph.

        Nobody else gets these pages. The captured step may be replayed `tokens` times; tell `replayed` how often. Waits
        for the device. Raises CacheBudgetError where there is no room.
        """
        self.settle()
        pool = self.tables.pool
        with pool.lock, pool.changing():
            self._holding.state = state = replace(self.state, promise=None)  # what was promised is for this now
            pool.demand.promises.add(self._holding)
            self._holding.state = promised(self.tables, self.index, state, tokens, self.quota)

    @bookkeeping
    def replayed(self, steps: int) -> None:
        """Take note of `steps` tokens of each sequence that a CUDA graph has read meanwhile.

        Raises CacheStateError where the graph has written elsewhere: rows have joined or left or tables have grown
        since it was captured.
        """
        with self.tables.pool.lock:
            self._holding.state = replayed(self.tables, self.state, steps)

    # Joining and leaving

    @bookkeeping
    def take(self, other: "Sequences") -> None:
        """Take over all sequences of another batch, behind one's own; the other is empty then. Nothing is copied.

        The batch is as if the shorter sequences had been padded on the left. Raises CacheStateError where the other
        is not over the same memory in the same mode, or runs a forward, and CacheBudgetError where this batch has a
        budget that does not hold both.
        """
        if self.tables is not other.tables or self.eviction != other.eviction:
            raise CacheStateError("only sequences of one attached model in one mode can run as one batch")
        if other is self or self.step is not None or other.step is not None:
            raise CacheStateError("a batch cannot take over sequences while a forward runs, nor its own")
        self.settle()
        other.settle()
        pool = self.tables.pool
        with pool.lock:
            self.quota.admit(self.rows + other.rows)
            self.reach_back(other.undo)
            other.reach_back(self.undo)
            both, none = joined(self.state, other.state, self.shape.device), State(epoch=other.state.epoch + 1)
            ours, theirs = self._holding, other._holding
            ours.state, theirs.state = both, none  # nothing is called between the two, where an interrupt might come
            self.quota.forget()
            other.quota.forget()

    @bookkeeping
    def select(self, indices: Sequence[int]) -> None:
        """Keep the sequences at `indices`, in that order; a repeated one shares its pages with its copies.

        The others leave and their pages are given back; nothing of those that stay is moved. Leading columns that are
        padding in all that stay are forgotten, so `seen` may fall and boundaries fall with it. Raises CacheStateError
        where there is no such sequence, and CacheBudgetError where a budget does not hold the copies.
        """
        self.settle()
        before = self.rows
        for i in indices:
            if not -len(before) <= i < len(before):
                raise CacheStateError(f"there is no sequence {i} in a cache of {len(before)}")
        tables, pool = self.tables, self.tables.pool
        with pool.lock, pool.changing():
            chosen: list[int] = []
            for i in indices:
                chosen.append(tables.fork(before[i]) if before[i] in chosen else before[i])
            if len(chosen) > len(before):
                self.quota.admit(chosen)
            self._holding.state = selected(self.state, chosen, [i % len(before) for i in indices])
            self.quota.forget()
            tables.leave([row for row in before if row not in chosen])

    @bookkeeping
    def fork(self) -> "Sequences":
        """The same sequences in a batch of their own, which shares all pages until one of them writes."""
        self.settle()
        twin = Sequences(self.shape, self.eviction, self.memory, self.quota.budget, self.undo)
        pool = self.tables.pool
        with pool.lock, pool.changing():
            rows = tuple(self.tables.fork(row) for row in self.rows)
            # A captured step would write into pages that are shared now, so it must be captured again.
            state = replace(self.state, shared=bool(rows), promise=None, epoch=self.state.epoch + 1)
            boundaries = state.boundaries.fork(zip(rows, self.rows, strict=True))
            self._holding.state = state
            twin._holding.state = replace(state, rows=rows, boundaries=boundaries)
        return twin

    @bookkeeping
    def reset(self) -> None:
        """End all sequences and give their memory back; no boundary is to be kept any more."""
        self.step = None
        pool = self.tables.pool
        with pool.lock, pool.changing():
            self._end_all(Boundaries())

    @bookkeeping
    def crop(self, columns: int) -> None:
        """Take the newest columns back: exact, or CacheStateError where what would be seen again is gone.

        Raises CacheBudgetError, with nothing changed, where a page that others see too would have to be copied and
        there is no room.
        """
        self.settle()
        tables, index, pool, state = self.tables, self.index, self.tables.pool, self.state
        if columns == state.seen:
            with pool.lock, pool.changing():
                self._end_all(state.boundaries.forgotten())
            return
        with pool.lock:
            now = tables.position[index] - self.columns_read()[:, -columns:].sum(1).int()
            if bool((self._lost() >= now[:, None, None]).any()):
                raise CacheStateError(
                    f"cannot crop back to position {int(now.min())}: tokens visible from there are already evicted; "
                    f"this cache has undo={self.undo}; octavo.attach(model, ..., undo=N) lets N tokens be taken back"
                )
            shared = named_elsewhere(pool, tables.table[index])
            copies = int((pages_to_own(tables, cut(tables, index, now, self.shift)) & shared).sum())
            with pool.changing():
                self._reserve(copies, copies)
            self._holding.state = cropped(state, columns, now)
        self.settle()

    # Snapshots

    @bookkeeping
    def restore(self, layout: SnapshotLayout, parts: Sequence[Ragged | Stretch], boundary: int) -> None:
        """Become the one sequence that sees `parts` at a boundary; nothing may be held. Raises as `restore_into`."""
        assert not self.rows
        counts, pool = counted(parts), self.tables.pool
        pages = int(pages_for(counts, pool.layout.page_size).sum())
        self.memory.reclaim()
        with pool.lock, pool.changing():
            (row,) = self.tables.join(1)
            self.quota.claim(pages, pages, (row,))
            restore_into(self.tables, row, layout, parts, boundary)
            self._holding.state = State(
                rows=(row,), seen=boundary, lead=(0,), longest=int(counts.max()), boundaries=self.boundaries,
                epoch=self.state.epoch + 1,
            )  # fmt: skip
