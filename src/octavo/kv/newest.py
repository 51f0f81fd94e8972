"""What is stored of the token before the next one, in a KV layer whose tokens are all marked, or where none is."""

import torch
from torch import Tensor

from octavo.attention.pages import rows as content
from octavo.kv.plan import found
from octavo.kv.tables import Index, Tables


def stored_before(
    tables: Tables, rows: Index, layer: int, start: Tensor, shift: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value [B, H, D] in `dtype` of the token before position `start` [B] int32; zeros where there is none.

    `rows`: the sequences' rows of the tables; `shift`: see `Eviction`. The host does not wait for the device.
    """
    pages, size = tables.pool.pages, tables.pool.layout.page_size
    table, length = tables.table[rows, layer], tables.length[rows, layer]  # [B, H, M], [B, H]
    at = (start - 1)[:, None, None].expand(*length.shape, 1)  # [B, H, 1]
    if shift:
        slot = tables.newest[rows, layer][..., None].long()
    elif tables.window is not None:
        slot = tables.marks[rows, layer].gather(-1, tables.place_of(at, at >= 0)).long()
    else:  # nothing has a note of where it is
        slots = torch.arange(table.shape[-1] * size, dtype=torch.int32, device=table.device)
        there = (pages.position[table].flatten(-2) == at) & (slots < length[..., None])  # [B, H, M * S]
        slot = torch.where(there, slots, -1).amax(-1, keepdim=True).long()
    some = (slot >= 0) & (at >= 0)
    page, inside = found(table, slot.clamp(min=0), some, size)
    picked = inside[..., None, None].expand(*inside.shape, 1, pages.key.shape[-1])
    key, value = (x.gather(-2, picked)[..., 0, 0, :].masked_fill(~some, 0) for x in content(pages, page, dtype))
    return key, value
