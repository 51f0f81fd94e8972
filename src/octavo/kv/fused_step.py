"""A decode step on a GPU: one new token per sequence, planned, written and noted by kernels, for all layers at once.

It gives what `octavo.kv.decode_step` gives with a hundredth of the launches, and depends on nothing that the host knows
but the batch size, so one CUDA graph serves every step.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from octavo.attention import Scoring, write
from octavo.kv.plan import found, named_elsewhere
from octavo.kv.step import Batch, Later, New, OnPages

if TYPE_CHECKING:
    from octavo.attention.cuda.plan import State, When


class FusedStep(OnPages):
    """One new token for each sequence in `rows` [B] int32, lines of the batch's tables; -1: none, its output is zero.

    `left` [] int32: how many slots were found free that `Tables.marks` did not name, where that was looked for.
    """

    decides_at_commit = True  # for all layers in one operation

    def __init__(self, batch: Batch, rows: Tensor, search: Tensor) -> None:
        """`search` [] int32: see `octavo.attention.cuda.plan.plan`."""
        from octavo.attention.cuda import decode, plan

        tables = batch.tables
        self.batch, self.rows, self.search, self.filled = batch, rows, search, 0
        self._decode, self._kernels = decode, plan
        self._new: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values that no layer has asked for yet
        with tables.pool.lock, tables.pool.changing():
            tables.widen(batch.longest)
            reserve_for(batch, len(rows))
            self._planned = plan.plan(self._state, tables.pool.pages, rows, search, self._when)
            tables.pool.post()
        self.found: Tensor = self._planned.found
        self.left: Tensor | None = self.found if batch.scattered else None
        at, slot = self._planned.at, self._planned.slot[..., None]
        each = tables.table.unbind(1), tables.length.unbind(1), slot.unbind(1), self._planned.begin.unbind(0)
        self._layers = list(zip(*each, strict=True))  # cut once, since cutting costs the host as much as a launch
        self.new = New(at[:, None], at[:, None], at, at, True)

    @property
    def _state(self) -> "State":
        tables, pool = self.batch.tables, self.batch.tables.pool
        return self._kernels.State(
            tables.position, tables.length, tables.lost, tables.newest, tables.table, tables.marks,
            pool.raw, pool.references, pool.free, pool.free_count,
        )  # fmt: skip

    @property
    def _when(self) -> "When":
        return self._kernels.When(
            self.batch.eviction.window if self.batch.eviction else 0, self.batch.shift, self.batch.undo
        )

    def update(self, layer: int, key: Tensor, value: Tensor, marked: Tensor | None = None) -> None:
        """Hold the new key and value [B, H, 1, D] of one layer; its first reader writes them."""
        self.filled += 1
        self._new[layer] = key, value

    def attend(self, layer: int, query: Tensor, scale: float, scoring: Scoring | None = None) -> Tensor:
        """Attention of the new tokens, [B, 1, Hq, D]; `query` [B, Hq, 1, D]."""
        new, table, length, slot, begin = None, *self._layers[layer]
        if layer in self._new:
            new = self._decode.Written(*self._new.pop(layer), slot, self.new.position)
        pages = self.batch.tables.pool.pages
        return self._decode.attend(
            query, self.new.at, pages, table, length, scale, begin, new, self.rows, scoring=scoring
        )

    @property
    def lines(self) -> Tensor:
        """See `OnPages`; those of places without a sequence mean nothing."""
        return self.rows.long().clamp(min=0)

    def settle(self, *layers: int) -> None:
        """Nothing is held back."""

    def commit(self, marked: Tensor | None) -> None:
        """Write when the new tokens expire (`marked` [L, B, H, 1] bool, None: never) and move on."""
        tables, planned = self.batch.tables, self._planned
        for layer, (key, value) in self._new.items():  # layers that nobody has read
            self._write(layer, key, value)
        with tables.pool.lock:
            decided = None if marked is None else marked[..., 0]
            self._kernels.note(self._state, tables.pool.pages, self.rows, planned, decided, self._when)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        tables, S = self.batch.tables, self.batch.tables.pool.layout.page_size
        slot = self._planned.slot[:, layer].long().clamp(min=0)[..., None]  # [B, H, 1]
        some = (self.rows >= 0)[:, None, None].expand_as(slot)
        table = tables.table[self.rows.long().clamp(min=0), layer]
        page, inside = found(table, slot, some, S)
        write(tables.pool.pages, page, inside, key, value)


class Replayed:
    """A step inside a CUDA graph, as the host sees it when the graph runs: all that it does is in the graph.

    The graph may have more places than there are sequences; those behind them stay empty.
    """

    decides_at_commit = True

    def __init__(self, step: FusedStep) -> None:
        self._step = step
        self._used = 0  # places that had a sequence the last time
        self.new = step.new  # written by the graph
        self.left: Tensor | None = None

    def prepare(self, rows: Tensor, search: Tensor, scattered: bool) -> None:
        """Say which sequences run, [B] int32, and whether rows are to be searched, [] int32."""
        places, B = self._step.rows, len(rows)
        self._used = max(self._used, B)  # wherever an interrupt comes, the next step empties all that may be used
        places[:B].copy_(rows)
        if self._used > B:
            places[B : self._used].fill_(-1)
        if len(self.new.start) != B:
            position, at, start, after, padded = self._step.new
            self.new = New(position[:B], at[:B], start[:B], after[:B], padded)
        self._used = B
        self._step.search.copy_(search)
        self.left = self._step.found if scattered else None

    def rehearse(self, marked: Tensor | None) -> None:
        """End a step that has run outside of a graph and for nobody: its kernels run once, and nothing is noted."""
        self._step.commit(marked)

    def commit(self, marked: Tensor | None) -> None:
        """The graph has done it; only now, after it has taken its pages, may they be counted."""
        self._step.batch.tables.pool.post()


def reserve_for(batch: Batch, sequences: int) -> None:
    """Make sure that there are pages for one more token of so many sequences. Raises CacheBudgetError."""
    tables, most = batch.tables, 1 + batch.shift  # pages that a row may have to copy

    def need() -> Tensor:
        pages = (tables.length[batch.index] % tables.pool.layout.page_size == 0).sum()
        if batch.shared:
            pages += most * named_elsewhere(tables.pool, tables.table[batch.index]).any(-1).sum()
        return pages

    claim = sequences * tables.length[0].numel() * (1 + most * batch.shared)
    batch.reserve(claim, Later(need), wait=False)
