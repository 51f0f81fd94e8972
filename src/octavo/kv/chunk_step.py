"""A forward of a piece of a prompt: it attends over pages and the chunk itself, then stores what can still be seen.

A layer's keys and values are held until its last reader is done, because a token that expires within the chunk should
never need a page. Layers wait for each other and are stored together, since storing takes some seventy operations.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from octavo.attention import Chunk, Scoring, attend, causal, cuda, slots, write
from octavo.config import NEVER
from octavo.kv.holes import Holes, holes_in, ranked
from octavo.kv.plan import append, extended, found, grown, owned_many, place
from octavo.kv.pool import pages_for
from octavo.kv.recorded_chunk import Made
from octavo.kv.rewind import Overwritten
from octavo.kv.step import Batch, Later, New, OnPages, counted, newest_slot
from octavo.kv.within import Within

if TYPE_CHECKING:
    from octavo.attention.cuda.chunk import Span

HELD = 2**26  # bytes of keys and values that may wait to be stored together
HELD_ON_CUDA = 2**28  # there the host waits for the device each time


class _Held(NamedTuple):
    """The new tokens of one layer until they are stored."""

    key: Tensor  # [B, H, N, D]
    value: Tensor  # [B, H, N, D]
    marked: Tensor | None  # [B, H, N] bool, None: none is


class Layers(NamedTuple):
    """The new tokens of some layers one after another, ready to be stored."""

    layers: slice
    key: Tensor  # [B, l, H, N, D]
    value: Tensor  # [B, l, H, N, D]
    expiry: Tensor  # [B, l, H, N] int32


def spans(new: New, columns: int, valid: Tensor | None) -> "Span | None":
    """Where the real tokens of each sequence are, None where padding lies among them.

    Waits for the device where there is padding.
    """
    from octavo.attention.cuda.chunk import Span

    if valid is None:
        count = torch.full_like(new.start, columns)
        return Span(torch.zeros_like(count), count, new.start)
    count, first = valid.sum(1, dtype=torch.int32), valid.int().argmax(1).int()
    column = torch.arange(columns, device=valid.device)
    together = (column >= first[:, None]) & (column < (first + count)[:, None])
    return Span(first, count, new.start) if bool((valid == together).all()) else None


class ChunkStep(OnPages):
    """Any number of new tokens, which attend to pages and to each other.

    `left` [] int32: the most slots of any row that are free and not known to `Tables.marks`, where that is known.
    `span`: where a kernel for the GPU finds the tokens, None where none is used.
    """

    decides_at_commit = False  # what a chunk forgets is decided layer by layer, before the layer attends

    def __init__(
        self, batch: Batch, columns: int, valid: Tensor | None, trains: bool, passes: tuple[int, ...] = ()
    ) -> None:
        tables = batch.tables
        self.batch = batch
        self.filled = 0
        self.left: Tensor | None = None
        self.new = counted(tables.position[batch.index].clone(), columns, valid)
        self.within = Within(batch, self.new, passes) if passes else None  # tails at boundaries that this goes past
        # Nothing is cached and nothing is padded; where nothing can expire for any query, attention is causal.
        first = batch.longest == 0 and valid is None
        self._plain = [first and batch.sees_all(layer, columns) for layer in range(tables.length.shape[1])]
        fits = cuda.available(tables.pool.device) and not trains and not all(self._plain)
        self.span = spans(self.new, columns, valid) if fits else None
        windowed = batch.lifetimes is not None
        self._expired = batch.expired or windowed or bool(batch.eviction and columns > batch.window)
        self.lost = tables.lost[batch.index].clone()  # [B, L, H], what it must be after `rewind`
        self._held: dict[int, _Held] = {}
        self._made: Made | None = None  # of all layers, in place of what is held
        self._held_most = HELD_ON_CUDA if tables.pool.device.type == "cuda" else HELD
        self._ready: list[int] = []  # layers whose readers are done
        self.overwritten: list[Overwritten] = []  # what `rewind` must bring back
        with tables.pool.lock:
            tables.widen(batch.longest + columns)

    def update(self, layer: int, key: Tensor, value: Tensor, marked: Tensor | None = None) -> None:
        """Hold the new keys and values [B, H, N, D] of one layer; `marked` [B, H, N] bool, None: nothing expires."""
        self.filled += 1
        if marked is not None and self.batch.shift:
            marked = self._settle_newest(layer, marked)
        self._held[layer] = _Held(key, value, marked)

    def take(self, made: Made) -> None:
        """Hold what a CUDA graph has made of the new tokens in all layers; `commit` stores it."""
        self._made = made
        self.filled = len(made.key)

    def _expiry(self, layers: slice, key: Tensor, marked: Tensor | None) -> Tensor:
        """When tokens with these keys [B, l, H, N, D] and marks [B, l, H, N] expire, [B, l, H, N] int32."""
        return self.batch.expiry(self.new.position, marked, layers).expand(key.shape[:-1]).contiguous()

    def attend(self, layer: int, query: Tensor, scale: float, scoring: Scoring | None = None) -> Tensor:
        """Attention of the last n new tokens, [B, n, Hq, D]; `query` [B, Hq, n, D]."""
        held, batch = self._held[layer], self.batch
        if self._plain[layer] and scoring is None:
            return causal.attend(query, held.key, held.value, scale)
        tables, at = batch.tables, self.new.at[:, -query.shape[2] :]
        table, length = tables.table[batch.index, layer], tables.length[batch.index, layer]
        past = tables.pool.pages, table[..., : batch.columns], length
        forgets = None if self.span is None else self._forgets(layer, held.marked)
        if self.span is not None and forgets is not None:
            from octavo.attention.cuda.chunk import attend as kernel

            cached: tuple[Any, Any, Any] = past if batch.longest else (None, None, None)
            return kernel(query, held.key, held.value, self.span, scale, *forgets, *cached, scoring)
        marked = None if held.marked is None else held.marked[:, None]
        expiry = self._expiry(slice(layer, layer + 1), held.key[:, None], marked)[:, 0]
        return attend(query, at, *past, scale, Chunk(held.key, held.value, self.new.position, expiry), scoring)

    def _forgets(self, layer: int, marked: Tensor | None) -> tuple[Tensor | None, int] | None:
        """(which tokens are forgotten after how many more) in a layer, as the kernel for the GPU is told; None where
        it cannot be: some of them at the end of their attention's chunk, or some sooner than others."""
        batch, position = self.batch, self.new.position
        life = None if batch.lifetimes is None else batch.lifetimes.each[layer]
        if life is None:
            return marked, batch.window
        if life.chunked or (marked is not None and batch.window < life.length - 1):
            return None
        every = torch.ones((), dtype=torch.bool, device=position.device)
        return every.expand(len(position), batch.tables.length.shape[2], position.shape[1]), life.length - 1

    def settle(self, *layers: int) -> None:
        """Nobody reads these layers' chunks any more: store what the next query can still see of them, now or soon."""
        self._ready += layers
        if 2 * self._held[layers[-1]].key.nbytes * len(self._ready) >= self._held_most:
            self._store_ready()

    def commit(self, marked: Tensor | None) -> None:
        """Move on; whatever has not been stored is stored now."""
        self._ready += [layer for layer in sorted(self._held) if layer not in self._ready]
        self._store_ready()
        if self._made is not None:
            key, value, marked = self._made
            marks = None if marked is None else marked.transpose(0, 1)
            self._store_layers(slice(0, self.filled), key.transpose(0, 1), value.transpose(0, 1), marks)
        tables = self.batch.tables
        with tables.pool.lock:
            tables.position[self.batch.index] = self.new.after

    def _store_ready(self) -> None:
        """Store the layers that are ready, those that follow each other together."""
        while self._ready:
            run = [self._ready.pop(0)]
            while self._ready and self._ready[0] == run[-1] + 1:
                run.append(self._ready.pop(0))
            held = [self._held.pop(layer) for layer in run]
            layers = slice(run[0], run[-1] + 1)
            key, value = (torch.stack([getattr(h, name).detach() for h in held], 1) for name in ("key", "value"))
            marks = [h.marked for h in held if h.marked is not None]  # of all layers or of none
            self._store_layers(layers, key, value, torch.stack(marks, 1) if marks else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _store_layers(self, layers: slice, key: Tensor, value: Tensor, marked: Tensor | None) -> None:
        """Store some layers' keys and values [B, l, H, N, D] with their marks [B, l, H, N]."""
        expiry = self._expiry(layers, key, marked)
        with self.batch.tables.pool.lock, self.batch.tables.pool.changing():
            self._store(Layers(layers, key, value, expiry))

    def _store(self, chunk: Layers) -> None:
        batch, tables, new = self.batch, self.batch.tables, self.new
        pool, S = tables.pool, tables.pool.layout.page_size
        rows = batch.index, chunk.layers
        next_query = new.after[:, None, None, None]
        real = (new.position >= 0)[:, None, None]
        stored = real & (chunk.expiry >= next_query - batch.undo)  # [B, l, H, N]
        whole, before = tables.table[rows], tables.length[rows]  # [B, l, H, M], [B, l, H]
        if batch.expired and batch.longest:
            limit, past = batch.free_before(new.after), whole[..., : batch.columns]
            free = holes_in(pool.pages, past, before, limit, new.position.shape[1])
            placed = place(free, before, stored)
            self._remember(chunk.layers, free, stored, whole)
        else:
            placed = append(before, stored)
        if batch.shared:
            whole = owned_many(pool, whole, placed.slot, stored, before, batch.reserve)
        if self.within is not None:
            self.within.take(chunk)
        columns = new.position.shape[1]
        batch.reserve(before.numel() * pages_for(columns, S), Later(lambda: grown(before, placed.length, S)))
        whole = extended(pool, whole, before, placed.length, columns)
        page, inside = found(whole, placed.slot, stored, S)
        write(pool.pages, page, inside, chunk.key, chunk.value)
        pool.pages.position[page, inside] = new.position[:, None, None].expand_as(page)
        pool.pages.expiry[page, inside] = chunk.expiry
        # Only now, so that every slot inside a row's length has been written, wherever an interrupt falls.
        tables.table[rows] = whole
        tables.length[rows] = placed.length
        pool.post()
        if self._expired:
            dropped = torch.where(real & ~stored, chunk.expiry, -1).amax(-1)
            tables.lost[rows] = torch.maximum(tables.lost[rows], torch.maximum(placed.lost, dropped))
        if tables.window is not None:
            self._note_marks(rows, placed.slot, stored & (chunk.expiry < NEVER))
        if placed.left is not None:
            left = placed.left.amax()
            self.left = left if self.left is None else torch.maximum(self.left, left)
        if batch.shift:
            tables.newest[rows] = newest_slot(placed.slot, new.position, tables.newest[rows])

    def _note_marks(self, rows: tuple[slice | Tensor, slice], slot: Tensor, marked: Tensor) -> None:
        """Tell `Tables.marks` where the marked ones among the new tokens are; `slot` and `marked` [B, l, H, N]."""
        tables, new = self.batch.tables, self.new
        back = self.batch.window + self.batch.undo
        # Slots of older tokens are free. With padding among them the last columns need not be the last tokens.
        span = slot.shape[-1] if new.padded else min(slot.shape[-1], back + 1)
        slot, marked = slot[..., -span:], marked[..., -span:]
        position = new.position[:, None, None, -span:]
        some = new.after > new.start
        # The slot that comes free for the next query may have been taken already; if not, a search will find it.
        nothing = torch.zeros_like(slot[..., :1])
        there = (new.after[:, None, None, None] - back - 1, some[:, None, None, None])
        tables.note_marks(rows, *there, nothing, nothing.bool())
        recent = position >= (new.after - back).clamp(min=0)[:, None, None, None]
        tables.note_marks(rows, position, recent, slot, marked)

    def _remember(self, layers: slice, free: Holes, stored: Tensor, table: Tensor) -> None:
        """Keep what `rewind` needs: of the slots that are taken over, those that came free within this chunk."""
        batch, new, pool = self.batch, self.new, self.batch.tables.pool
        start = batch.free_before(new.start)[:, None, None, None]
        taken = free.first(stored.sum(-1))
        dead = torch.where(taken & (free.expiry < start), free.expiry, -1).amax(-1)
        self.lost[:, layers] = torch.maximum(self.lost[:, layers], dead)  # overwritten for good
        some, slot, most = taken & (free.expiry >= start), free.slot, batch.window + 1 + batch.undo
        if batch.lifetimes is None and slot.shape[-1] > most:  # no gate lets more of a row come free at once
            order = some.cumsum(-1, dtype=torch.int32)
            slot = slot.gather(-1, ranked(some, order, most)[..., :most])
            some = torch.arange(most, device=slot.device) < order[..., -1:]
        where = found(table, slot, some, pool.layout.page_size)
        self.overwritten.append(Overwritten(layers, slot, some, slots(pool.pages, *where)))

    def _settle_newest(self, layer: int, marked: Tensor) -> Tensor:
        """Marks of the new tokens, each read at the next real one; the first is about the cached newest token."""
        tables, batch, new = self.batch.tables, self.batch, self.new
        real, N = new.position >= 0, new.position.shape[1]
        columns = torch.arange(N, device=real.device).where(real, N)
        following = columns.flip(1).cummin(1).values.flip(1)  # the first real token at or after each column
        marks = torch.cat([marked, marked.new_zeros(*marked.shape[:2], 1)], 2)
        everywhere = (-1, marked.shape[1], -1)
        slot = tables.newest[batch.index, layer].long()[..., None]  # [B, H, 1]
        doomed = marks.gather(2, following[:, None, :1].expand(everywhere)) & (slot >= 0)
        before = new.start[:, None, None] - 1  # the cached newest token's position
        with tables.pool.lock, tables.pool.changing(), torch.inference_mode(False), torch.no_grad():
            table = tables.table[batch.index, layer]
            if batch.shared:
                length = tables.length[batch.index, layer]
                table = owned_many(tables.pool, table, slot, doomed, length, batch.reserve)
                tables.table[batch.index, layer] = table
            page, inside = found(table, slot.clamp(min=0), doomed, tables.pool.layout.page_size)
            tables.pool.pages.expiry[page, inside] = (before + batch.window).expand_as(page)
            tables.note_marks((batch.index, layer), before, before >= 0, slot, doomed)
        later = torch.cat([following[:, 1:], torch.full_like(following[:, :1], N)], 1)
        return marks.gather(2, later[:, None].expand(everywhere))
