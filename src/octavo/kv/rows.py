"""The rows of one batch: which pages each (layer, sequence, KV head) holds, and the write that fills them.

Of N new tokens of a sequence at least min(N, window) are written, because the last `window` tokens are visible
whatever the gate said, and at most min(N, window) old slots expire meanwhile. So every expired slot is filled
by the same write that finds it, in place; nothing is moved, and no list of holes is kept.
"""

import torch
from torch import Tensor

from octavo.errors import CacheStateError
from octavo.kv.pool import PagePool

TABLE_STEP = 8  # page tables widen by this many columns


class Rows:
    """Page tables of all rows [L, B, H] over one pool.

    `table` [L, B, H, M] int32 page ids, `length` [L, B, H] int32 slots in use, `lost` [L, B, H] int32 the
    latest expiry among forgotten tokens (-1: none): the cache can go back to any position past it.
    """

    def __init__(self, pool: PagePool, layers: int, batch: int, kv_heads: int) -> None:
        device = pool.k.device
        self.pool = pool
        self.table = torch.zeros(layers, batch, kv_heads, TABLE_STEP, dtype=torch.int32, device=device)
        self.length = torch.zeros(layers, batch, kv_heads, dtype=torch.int32, device=device)
        self.lost = torch.full_like(self.length, -1)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and of the tables."""
        tables = (self.table, self.length, self.lost)
        return self.pool.nbytes + sum(t.numel() * t.element_size() for t in tables)

    def live(self, now: Tensor) -> Tensor:
        """Slots visible to a query at `now` [B] int64: [L, B, H] int64."""
        if self.pool.pages == 0:
            return torch.zeros_like(self.length, dtype=torch.int64)
        slots = torch.arange(self.table.shape[3] * self.pool.page_size, device=self.table.device)
        return ((slots < self.length[..., None]) & (self._expiry() >= now[None, :, None, None])).sum(-1)

    def write(
        self,
        key: Tensor,  # [L, B, H, N, D]
        value: Tensor,  # [L, B, H, N, D]
        position: Tensor,  # [B, N] int32, -1 is padding
        expiry: Tensor,  # [L, B, H, N] int32
        now: Tensor,  # [B] int64, position of the next query
        expired: bool,  # whether any slot can have expired since the last write
        padded: bool,  # whether `position` holds padding
    ) -> Tensor:
        """Store what the next query can still see; returns each token's slot in its row [L, B, H, N] int64.

        Slots of tokens that are not stored are meaningless. Raises CacheBudgetError with nothing changed.
        """
        next_query = now[None, :, None, None]
        real = (position >= 0)[None, :, None]
        alive = real & (expiry >= next_query)
        slot, length, lost = self._place(alive, next_query, expired)
        self._extend(length)
        at = self.at(slot).flatten()
        source: Tensor | slice = slice(None)
        if padded or (expired and position.shape[1] > 1):  # else all are visible to the next query
            source = alive.flatten().nonzero()[:, 0]
            at = at[source]
        D = key.shape[-1]
        self.pool.k.view(-1, D)[at] = key.reshape(-1, D)[source].to(self.pool.k.dtype)
        self.pool.v.view(-1, D)[at] = value.reshape(-1, D)[source].to(self.pool.v.dtype)
        self.pool.position.view(-1)[at] = position[None, :, None].expand_as(expiry).reshape(-1)[source]
        self.pool.expiry.view(-1)[at] = expiry.reshape(-1)[source]
        self.length = length
        if expired:
            dropped = torch.where(real & ~alive, expiry, -1).amax(-1)
            self.lost = torch.maximum(self.lost, torch.maximum(lost, dropped))
        return slot

    def at(self, slot: Tensor, layers: slice = slice(None)) -> Tensor:
        """Where slots of rows lie in the flattened pool: [l, B, H, n] int64, for some layers' rows."""
        S, table = self.pool.page_size, self.table[layers]
        page = table.gather(3, slot.div(S, rounding_mode="floor").clamp(0, table.shape[3] - 1))
        return page.long() * S + slot % S

    def _expiry(self) -> Tensor:
        """Expiry of all slots of all rows [L, B, H, M*S] int32; past a row's length it is meaningless."""
        return self.pool.expiry[self.table].flatten(3)

    def _place(self, alive: Tensor, next_query: Tensor, expired: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Slots for the survivors: expired slots first, then the end of the row. With the new lengths and `lost`."""
        rank = alive.cumsum(-1) - 1  # [L, B, H, N]
        count = rank[..., -1] + 1
        if not expired or self.pool.pages == 0:
            return self.length[..., None] + rank, (self.length + count).int(), self.lost
        old = self._expiry()
        slots = torch.arange(old.shape[-1], device=old.device)
        hole = (slots < self.length[..., None]) & (old < next_query)
        N = alive.shape[-1]
        if N == 1:  # decoding: at most one slot has expired, and finding it must cost little
            first = hole.to(torch.uint8).argmax(-1, keepdim=True)
            found = hole.gather(-1, first) & alive
            slot = torch.where(found, first, self.length[..., None].long())
            lost = torch.where(found, old.gather(-1, first), -1)[..., 0]
            return slot, (self.length + (alive & ~found)[..., 0]).int(), lost
        lost = torch.where(hole, old, -1).amax(-1)
        order = hole.cumsum(-1, dtype=torch.int32)
        holes = order[..., -1].clamp(max=N)
        # hole_at[i] is the i-th expired slot; what is not among the first N goes to a spill column.
        hole_at = slots.new_zeros(*hole.shape[:-1], N + 1)
        spill = torch.where(hole & (order <= N), order - 1, N).long()
        hole_at.scatter_(-1, spill, slots.expand_as(spill))
        appended = self.length[..., None] + rank - holes[..., None]
        slot = torch.where(rank < holes[..., None], hole_at.gather(-1, rank.clamp(min=0)), appended)
        return slot, (self.length + (count - holes).clamp(min=0)).int(), lost

    def _extend(self, length: Tensor) -> None:
        """Give every row the pages that `length` slots need."""
        S = self.pool.page_size
        have = (self.length + S - 1).div(S, rounding_mode="floor").long()
        need = (length + S - 1).div(S, rounding_mode="floor").long() - have
        total = need.sum()
        pages, width = torch.stack([total, (have + need).max()]).tolist()  # the one host read
        if pages == 0:
            return
        self.pool.reserve(pages)
        if width > self.table.shape[3]:
            wide = -(-width // TABLE_STEP) * TABLE_STEP
            table = self.table.new_zeros(*self.table.shape[:3], wide)
            table[..., : self.table.shape[3]] = self.table
            self.table = table
        need, have = need.flatten(), have.flatten()
        fresh = torch.arange(pages, device=length.device)
        row = torch.repeat_interleave(need, output_size=pages)  # of each fresh page
        column = have[row] + fresh - (need.cumsum(0) - need)[row]
        self.table.view(len(need), -1)[row, column] = self.pool.peek(fresh)
        self.pool.take(total)

    def crop(self, now: Tensor) -> None:
        """Forget every token at or past position `now` [B] int64.

        Raises CacheStateError, with nothing changed, when a query at `now` would need an evicted token.
        """
        if bool((self.lost >= now[None, :, None]).any()):
            raise CacheStateError(
                f"cannot crop back to position {int(now.min())}: tokens visible from there are already evicted"
            )
        if self.pool.pages == 0:
            return
        used = self._used(self.length)
        ids = self.table[used].long()
        sequence = torch.arange(self.table.shape[1], device=now.device)[None, :, None, None].expand_as(self.table)
        position, expiry = self.pool.position[ids], self.pool.expiry[ids]  # [n, S]
        gone = position >= now[sequence[used]][:, None]
        self.pool.expiry[ids] = expiry.masked_fill(gone, -1)
        self.pool.position[ids] = position.masked_fill(gone, -1)
        slots = torch.arange(self.table.shape[3] * self.pool.page_size, device=now.device)
        held = (slots < self.length[..., None]) & (self._expiry() >= 0)
        length = torch.where(held, slots + 1, 0).amax(-1).int()
        self.table = self.pool.repack(self.table, self._used(length))
        self.length = length

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences at these indices (int64 [n]), in this order; an index named twice is copied."""
        table, length = self.table[:, sequences], self.length[:, sequences]
        self.table = self.pool.repack(table, self._used(length, table.shape[3]))
        self.length, self.lost = length, self.lost[:, sequences]

    def _used(self, length: Tensor, width: int | None = None) -> Tensor:
        """Which table columns hold pages of rows with these lengths: [L, B, H, M] bool."""
        columns = torch.arange(self.table.shape[3] if width is None else width, device=length.device)
        return columns * self.pool.page_size < length[..., None]
