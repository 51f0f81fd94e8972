"""Taking tokens back: after a step that failed or was interrupted, and for `crop`. All of it may run twice."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention import put
from octavo.config import NEVER
from octavo.kv.plan import Reserve, found, owned_pages
from octavo.kv.pool import NOWHERE
from octavo.kv.tables import Index, Tables


class Overwritten(NamedTuple):
    """Slots of some layers that a step may have overwritten, and what they held."""

    layers: slice
    slot: Tensor  # [B, l, H, K] int64
    some: Tensor  # [B, l, H, K] bool, which of them there are
    content: list[Tensor]  # as `octavo.attention.slots` gives it


class Cut(NamedTuple):
    """What taking rows back means for their slots, W for each row."""

    now: Tensor  # [B] int32, tokens that stay
    length: Tensor  # [B, L, H] int32, slots in use afterwards
    gone: Tensor  # [B, L, H, W] bool, slots inside that length whose tokens go
    reopened: Tensor  # [B, L, H, W] bool, slots whose token may not expire any more: its mark is open again
    newest: Tensor | None  # [B, L, H] int32, see `Tables.newest`


def listed(table: Tensor, some: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(page, slot inside it), int64 [n] each, of `some` slots (bool [..., W]) of rows with these pages [..., M]."""
    *row, slot = some.nonzero().unbind(1)
    return table[(*row, slot // page_size)].long(), slot % page_size


def restore_overwritten(tables: Tables, index: Index, overwritten: Sequence[Overwritten]) -> None:
    """Put back what a step has overwritten; needs no page, since it has written into pages of its own only."""
    pool = tables.pool
    for layers, slot, some, content in overwritten:
        put(pool.pages, *found(tables.table[index][:, layers], slot, some, pool.layout.page_size), content)


def cut(tables: Tables, index: Index, now: Tensor, shift: int) -> Cut:
    """How to forget every token of some rows at or past position `now` [B] int32. Changes nothing.

    What lies past a row's length means nothing, so only slots before the last one that stays must be written to. With
    `shift` 1 the mark of the newest token left is open again.
    """
    pages, table, at = tables.pool.pages, tables.table[index], now[:, None, None, None]
    position, expiry = (part[table].flatten(-2) for part in (pages.position, pages.expiry))  # [B, L, H, W]
    slots = torch.arange(position.shape[-1], dtype=torch.int32, device=now.device)
    inside = slots < tables.length[index][..., None]
    stays = inside & (position < at) & (expiry > 0)
    length = torch.where(stays, slots + 1, 0).amax(-1).int()
    gone = inside & (position >= at) & (slots < length[..., None])
    if not shift:
        return Cut(now, length, gone, torch.zeros_like(gone), None)
    newest = stays & (position == at - 1) & (at > 0)
    slot = torch.where(newest, slots, -1).amax(-1).int()
    return Cut(now, length, gone, newest & (expiry != NEVER), slot)


def pages_to_own(tables: Tables, what: Cut) -> Tensor:
    """Which of the rows' pages taking them back writes into, [B, L, H, M] bool."""
    written = what.gone | what.reopened
    return written.view(*written.shape[:-1], -1, tables.pool.layout.page_size).any(-1)


def rewind(tables: Tables, index: Index, what: Cut, reserve: Reserve) -> None:
    """Take rows back as `cut` says, and give pages that are empty then back. Waits for the device.

    Pages that others name too are copied where they are written to, after those that go have been given back. After a
    step there are none: it has made the pages that it wrote into its own. Drafts are taken back after every step, so
    what goes is listed: it is little, and rows are long.
    """
    pool, S = tables.pool, tables.pool.layout.page_size
    table, kept = tables.table[index].clone(), tables.used(what.length)
    unused = tables.used(tables.length[index]) & ~kept
    tables.length[index] = what.length
    tables.table[index] = torch.where(kept, table, NOWHERE)
    for row in range(len(table)):  # a page stands once in a row, but may stand in several
        ids = table[row][unused[row]].long()
        if len(ids):
            pool.drop(ids, torch.ones_like(ids, dtype=torch.bool))
    table = owned_pages(pool, tables.table[index], pages_to_own(tables, what), reserve)
    tables.table[index] = table
    spots = listed(table, what.gone, S)
    pool.pages.position[spots] = -1
    pool.pages.expiry[spots] = -1
    if what.newest is not None:
        pool.pages.expiry[listed(table, what.reopened, S)] = NEVER
        tables.newest[index] = what.newest
    tables.find_marks(index, what.now)
    tables.position[index] = what.now
    pool.post()
