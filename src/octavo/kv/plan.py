"""Which slots new tokens take: slots of expired tokens first, then the end of the row. Tensors only.

A row is one (sequence, layer, KV head). All functions work on any leading dimensions [...] of rows at once.
"""

from collections.abc import Callable
from typing import NamedTuple, SupportsInt

import torch
from torch import Tensor

from octavo.kv.holes import Holes
from octavo.kv.pool import WASTE, PagePool, pages_for

Reserve = Callable[[int, SupportsInt], None]  # lets at most so many pages be taken, of which so many are needed


class Placed(NamedTuple):
    """Where new tokens go."""

    slot: Tensor  # [..., N] int64; without meaning for tokens that are not stored
    length: Tensor  # [...] int32, slots in use afterwards
    lost: Tensor  # [...] int32, the latest expiry among the slots that are overwritten, -1: none
    left: Tensor | None  # [...] int32, free slots that are left over; None: there were none before either


def append(length: Tensor, stored: Tensor) -> Placed:
    """Places for tokens (`stored` [..., N] bool) where no slot has expired: the end of each row."""
    rank = stored.cumsum(-1)
    return Placed(length[..., None] + rank - 1, (length + rank[..., -1]).int(), torch.full_like(length, -1), None)


def take_over(free: Tensor, expired: Tensor, length: Tensor, stored: Tensor) -> Placed:
    """Places for one token each (`stored` [..., 1] bool) where at most one slot is free in each row.

    `free` [..., 1] int32 is that slot, -1 where there is none; `expired` [..., 1] int32 is when it expired.
    """
    taken = (free >= 0) & stored
    slot = torch.where(taken, free, length[..., None]).long()
    return Placed(slot, length + (stored & ~taken)[..., 0].int(), torch.where(taken, expired, -1)[..., 0], None)


def place(free: Holes, length: Tensor, stored: Tensor) -> Placed:
    """Places for tokens (`stored` [..., N] bool): free slots first, of which N are told, then the end of each row."""
    K = free.slot.shape[-1]
    rank = stored.cumsum(-1) - 1  # [..., N]
    count = rank[..., -1] + 1
    taken = torch.minimum(count, free.total)
    appended = length[..., None] + rank - taken[..., None]
    slot = torch.where(rank < taken[..., None], free.slot.gather(-1, rank.clamp(0, K - 1)), appended)
    lost = torch.where(free.first(count), free.expiry, -1).amax(-1)
    return Placed(slot, (length + count - taken).int(), lost, (free.total - taken).int())


def extended(pool: PagePool, table: Tensor, before: Tensor, after: Tensor, tokens: int) -> Tensor:
    """The table [..., M] int32 with fresh pages where rows grow from `before` to `after` [...], by `tokens` at most."""
    S, M = pool.layout.page_size, table.shape[-1]
    have, need = pages_for(before.long(), S), pages_for(after.long(), S)
    column = have[..., None] + torch.arange(pages_for(tokens, S), device=table.device)  # no row needs more than these
    fresh = column < need[..., None]
    ids = pool.take(fresh).int()
    wider = torch.nn.functional.pad(table, (0, 1))  # the last column takes what is not fresh
    return wider.scatter_(-1, torch.where(fresh, column, M), ids)[..., :M]


def found(table: Tensor, slot: Tensor, stored: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(page, slot inside it) of slots [..., N] of rows, int64; the waste page where a token is not `stored`."""
    column = (slot // page_size).clamp(0, table.shape[-1] - 1)
    return torch.where(stored, table.gather(-1, column).long(), WASTE), slot % page_size


def grown(before: Tensor, after: Tensor, page_size: int) -> Tensor:
    """Pages that rows need which grow from `before` to `after` slots, int64 scalar."""
    return (pages_for(after, page_size) - pages_for(before, page_size)).sum()


def named_elsewhere(pool: PagePool, table: Tensor) -> Tensor:
    """Which pages of a table [..., M] are named more than once, bool."""
    return pool.references[table.long()] > 1


def owned(pool: PagePool, table: Tensor, slot: Tensor, written: Tensor, before: Tensor) -> Tensor:
    """The table [..., M] with a page of its own for each slot [..., N] that is `written` on a page had before.

    `before` [...]: slots in use before this step; what lies past them is on fresh pages.
    """
    column, had = _written(pool, table, slot, written, before)
    for i in range(slot.shape[-1]):  # one after another: two tokens of a row may go to one page
        at = column[..., i : i + 1]
        page = table.gather(-1, at)
        table = table.scatter(-1, at, pool.own(page.long(), had[..., i : i + 1]).int())
    return table


def copies(pool: PagePool, table: Tensor, slot: Tensor, written: Tensor, before: Tensor) -> Tensor:
    """Pages that `owned` copies at most, int64 scalar."""
    column, had = _written(pool, table, slot, written, before)
    shared = had & named_elsewhere(pool, table.gather(-1, column))
    same = (column[..., :, None] == column[..., None, :]) & shared[..., None, :]
    return (shared & ~same.tril(-1).any(-1)).sum()


def _written(pool: PagePool, table: Tensor, slot: Tensor, written: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(table column of each slot, whether it is written on a page that was had before), both [..., N]."""
    S = pool.layout.page_size
    column = (slot // S).clamp(0, table.shape[-1] - 1)
    return column, written & (column < pages_for(before.long(), S)[..., None])


def owned_many(
    pool: PagePool,
    table: Tensor,
    slot: Tensor,
    written: Tensor,
    before: Tensor,
    reserve: Reserve,
) -> Tensor:
    """`owned` for many tokens at once, whose pages it lets `reserve`; it waits for the device."""
    M = table.shape[-1]
    column, had = _written(pool, table, slot, written, before)
    touched = torch.zeros(*table.shape[:-1], M + 1, dtype=torch.bool, device=table.device)
    return owned_pages(pool, table, touched.scatter_(-1, torch.where(had, column, M), True)[..., :M], reserve)


def owned_pages(pool: PagePool, table: Tensor, touched: Tensor, reserve: Reserve) -> Tensor:
    """The table [..., M] with pages of its own where `touched` (bool [..., M]); waits for the device."""
    touched = touched & named_elsewhere(pool, table)
    ids = table[touched].long()
    if len(ids) == 0:
        return table
    reserve(len(ids), len(ids))
    table = table.clone()
    table[touched] = pool.own(ids, torch.ones_like(ids, dtype=torch.bool)).int()
    return table
