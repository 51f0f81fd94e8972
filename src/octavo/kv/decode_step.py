"""A forward of few tokens, planned once for all layers: which slots they take, which pages are needed.

A layer writes into its slots and attends over pages only; on a GPU one kernel does both. None of it asks the device for
anything, so a CUDA graph can hold it.
"""

import torch
from torch import Tensor

from octavo.attention import Scoring, attend, cuda, write
from octavo.kv.holes import holes_in
from octavo.kv.plan import Placed, append, copies, extended, found, grown, owned, place, take_over
from octavo.kv.pool import WASTE, pages_for
from octavo.kv.step import Batch, Later, OnPages, counted, newest_slot


class DecodeStep(OnPages):
    """At most as many new tokens as the window is long, so that each survives its own step.

    `left` [] int32: the most slots of any row that are free and not known to `Tables.marks`, where that is known.
    """

    decides_at_commit = True  # for all layers in one operation

    def __init__(self, batch: Batch, columns: int, valid: Tensor | None) -> None:
        tables = batch.tables
        self.batch = batch
        self.filled = 0  # layers whose keys and values came
        self.left: Tensor | None = None
        with tables.pool.lock, tables.pool.changing():
            tables.widen(batch.longest)
            self.new = counted(tables.position[batch.index].clone(), columns, valid)
            self._plan()

    def _plan(self) -> None:
        """Choose a slot for every new token in every layer and head, and write positions, for all layers at once."""
        batch, tables, new = self.batch, self.batch.tables, self.new
        pool, S = tables.pool, tables.pool.layout.page_size
        table, before = tables.table[batch.index, :, :, : batch.columns], tables.length[batch.index]
        rows = before.shape
        stored = (new.position >= 0)[:, None, None].expand(*rows, -1)  # [B, L, H, N]
        placed = self._placed(table, before, stored)
        newest = tables.newest[batch.index].long()[..., None]
        columns = stored.shape[-1]
        claim, wait = before.numel() * pages_for(columns, S), not pool.raw.is_cuda  # on the host nothing is to wait for
        if batch.shared:
            # With shift 1 the newest token's page too: its expiry is written.
            slot = torch.cat([newest.clamp(min=0), placed.slot], -1) if batch.shift else placed.slot
            written = torch.cat([newest >= 0, stored], -1) if batch.shift else stored

            shared = table
            need = Later(lambda: grown(before, placed.length, S) + copies(pool, shared, slot, written, before))
            batch.reserve(claim + slot.numel(), need, wait)
            table = owned(pool, table, slot, written, before)
        else:
            batch.reserve(claim, Later(lambda: grown(before, placed.length, S)), wait)
        table = extended(pool, table, before, placed.length, columns)
        if batch.expired:
            tables.lost[batch.index] = torch.maximum(tables.lost[batch.index], placed.lost)
        self.slot = placed.slot
        # Views of all layers at once: made one by one they would cost the host more than the attention of a short text.
        self._over = list(zip(table.unbind(1), placed.length.unbind(1), strict=True))
        self._begins: Tensor | None = None  # [L, B * H + 1]
        if cuda.available(pool.device):
            self._begins = cuda.begins(placed.length.transpose(0, 1))
        self.left = None if placed.left is None else placed.left.amax()
        self.page, self.inside = found(table, placed.slot, stored, S)
        self._newest = found(table, newest.clamp(min=0), newest >= 0, S) if batch.shift else None
        self._into = list(zip(self.page.unbind(1), self.inside.unbind(1), strict=True))
        pool.pages.position[self.page, self.inside] = new.position[:, None, None].expand(*rows, -1)
        pool.pages.expiry[self.page, self.inside] = self._expiry(new.position, None)
        # Only now, so that every slot inside a row's length has been written, wherever an interrupt falls.
        tables.table[batch.index, :, :, : batch.columns] = table
        tables.length[batch.index] = placed.length
        pool.post()

    def _expiry(self, position: Tensor, marked: Tensor | None) -> Tensor:
        """When new tokens at `position` [B, N] with these marks [B, L, H, N] expire, [B, L, H, N] int32."""
        return self.batch.expiry(position, marked, slice(None)).expand(self.page.shape)

    def _placed(self, table: Tensor, before: Tensor, stored: Tensor) -> Placed:
        """Where the new tokens go: into slots that are free, as far as there are any."""
        batch, new = self.batch, self.new
        if not batch.expired:
            return append(before, stored)
        now, tables = new.start[:, None, None, None], batch.tables
        if batch.scattered or stored.shape[-1] > 1:
            limit = batch.free_before(new.start)
            return place(holes_in(tables.pool.pages, table, before, limit, stored.shape[-1]), before, stored)
        if tables.window is None:
            return append(before, stored)
        expired = now - 1 - batch.undo  # what comes free now
        at = ((expired - batch.window) % tables.ring).long().expand(*before.shape, 1)
        return take_over(tables.marks[batch.index].gather(-1, at), expired, before, stored)

    def update(self, layer: int, key: Tensor, value: Tensor, marked: Tensor | None = None) -> None:
        """Write the new keys and values [B, H, N, D] of one layer into their slots."""
        self.filled += 1
        write(self.batch.tables.pool.pages, *self._into[layer], key, value)

    def attend(self, layer: int, query: Tensor, scale: float, scoring: Scoring | None = None) -> Tensor:
        """Attention of the last n new tokens, [B, n, Hq, D]; `query` [B, Hq, n, D]."""
        pages, at, n = self.batch.tables.pool.pages, self.new.at, query.shape[2]
        at, where = at if n == at.shape[1] else at[:, -n:], self._over[layer]
        if self._begins is None:
            return attend(query, at, pages, *where, scale, scoring=scoring)
        from octavo.attention.cuda import decode

        return decode.attend(query, at, pages, *where, scale, self._begins[layer], scoring=scoring)

    def settle(self, *layers: int) -> None:
        """Nothing is held back."""

    def commit(self, marked: Tensor | None) -> None:
        """Write when the new tokens expire (`marked` [L, B, H, N] bool, None: never) and move on."""
        tables, batch, new = self.batch.tables, self.batch, self.new
        with tables.pool.lock:
            if batch.eviction is not None:
                self._decide(marked)
            if batch.shift:
                tables.newest[batch.index] = newest_slot(self.slot, new.position, tables.newest[batch.index])
            tables.position[batch.index] = new.after

    def _decide(self, marked: Tensor | None) -> None:
        tables, batch = self.batch.tables, self.batch
        page, inside, slot, position = self.page, self.inside, self.slot, self.new.position
        real = position >= 0
        if batch.shift:
            # Each decision is about the token before; the newest token's own comes with the next step.
            page, inside, slot = self._one_before()
            position = position - 1
            real = real & (position >= 0)
        decided = torch.zeros_like(slot, dtype=torch.bool) if marked is None else marked.transpose(0, 1)
        tables.pool.pages.expiry[page, inside] = self._expiry(position, decided)
        if tables.window is not None:
            tables.note_marks(batch.index, position[:, None, None], real[:, None, None], slot, decided)

    def _one_before(self) -> tuple[Tensor, Tensor, Tensor]:
        """(page, place inside it, slot), each [B, L, H, N], of the real token before each new one.

        The waste page stands before padding and before a sequence's first token.
        """
        assert self._newest is not None
        newest = self.batch.tables.newest[self.batch.index][..., None].long()
        if self.slot.shape[-1] == 1:
            page, inside, slot = *self._newest, newest
            dead = (self.new.position <= 0)[:, None, None].expand_as(page)
            return page.masked_fill(dead, WASTE), inside, slot
        real = self.new.position >= 0
        columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
        last = torch.where(real, columns, -1).cummax(1).values  # the last real column up to each
        before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)  # -1: the cached newest token
        first = (before < 0)[:, None, None]
        at = before.clamp(min=0)[:, None, None].expand_as(self.page)
        dead = (self.new.position <= 0)[:, None, None].expand_as(self.page)
        page = torch.where(first, self._newest[0], self.page.gather(-1, at)).masked_fill(dead, WASTE)
        inside = torch.where(first, self._newest[1], self.inside.gather(-1, at))
        return page, inside, torch.where(first, newest, self.slot.gather(-1, at))
