"""Taking tokens back: after a step that failed or was interrupted, and for `crop`. All of it may run twice."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention import put
from octavo.config import NEVER
from octavo.kv.plan import found, owned_many
from octavo.kv.pool import NOWHERE
from octavo.kv.tables import Tables


class Overwritten(NamedTuple):
    """Slots of some layers that a step may have overwritten, and what they held."""

    layers: slice
    slot: Tensor  # [B, l, H, K] int64
    some: Tensor  # [B, l, H, K] bool, which of them there are
    content: list[Tensor]  # as `octavo.attention.slots` gives it


def rewind(
    tables: Tables, index: slice | Tensor, now: Tensor, shift: int, overwritten: Sequence[Overwritten] = ()
) -> None:
    """Forget every token of some rows at or past position `now` [B] int32, and give pages that are empty then back.

    What was overwritten meanwhile comes back as far as `overwritten` tells: see `Tables.lost`. With `shift` 1 the mark
    of the newest token left is open again. Waits for the device.
    """
    pool, S = tables.pool, tables.pool.layout.page_size
    with pool.lock:
        pool.mend()  # an interrupted step may have taken pages that no table names
        table, length = tables.table[index], tables.length[index]
        slots = torch.arange(table.shape[-1] * S, device=now.device)
        inside = slots < length[..., None]
        position = pool.pages.position[table].flatten(-2)  # [B, L, H, W]
        at = now[:, None, None, None]
        gone = inside & (position >= at)
        table = owned_many(pool, table, slots.expand_as(gone), gone, length)
        tables.table[index] = table
        spots = found(table, slots.expand_as(gone), gone, S)
        pool.pages.position[spots] = -1
        pool.pages.expiry[spots] = -1
        for layers, slot, some, content in overwritten:
            put(pool.pages, *found(table[:, layers], slot, some, S), content)
        held = inside & (pool.pages.expiry[table].flatten(-2) > 0)  # 0 in a page that nothing was written to yet
        length = torch.where(held, slots + 1, 0).amax(-1).int()
        if shift:
            position = pool.pages.position[table].flatten(-2)
            newest = torch.where(inside & (position == at - 1), slots, -1).amax(-1, keepdim=True)
            table = owned_many(pool, table, newest.clamp(min=0), newest >= 0, length)
            tables.table[index] = table
            pool.pages.expiry[found(table, newest.clamp(min=0), newest >= 0, S)] = NEVER
            tables.newest[index] = newest[..., 0].int()
        unused = tables.used(tables.length[index]) & ~tables.used(length)
        tables.length[index] = length
        for row in range(len(table)):  # a page stands once in a row, but may stand in several
            pool.drop(table[row].long(), unused[row])
        tables.table[index] = torch.where(tables.used(length), table, NOWHERE)
        tables.find_marks(index, now)
        tables.position[index] = now
