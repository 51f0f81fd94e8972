"""What is stored of one token of each sequence, found by its position."""

import torch
from torch import Tensor

from octavo.attention import Pages
from octavo.attention.pages import rows
from octavo.kv.plan import found


def stored_at(
    pages: Pages, table: Tensor, length: Tensor, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Key and value [B, H, D] in `dtype` of the token at `position` [B] int32 in one layer, zeros where there is none.

    `table` [B, H, M] and `length` [B, H] int32 are the sequences' pages and slots in use. The host does not wait.
    """
    size, at = pages.key.shape[1], position[:, None, None]
    slots = torch.arange(table.shape[-1] * size, device=table.device)
    there = (pages.position[table].flatten(-2) == at) & (slots < length[..., None]) & (at >= 0)  # [B, H, M * S]
    some, slot = there.any(-1, keepdim=True), there.int().argmax(-1, keepdim=True)
    page, inside = found(table, slot, some, size)  # [B, H, 1]
    key, value = rows(pages, page, dtype)  # [B, H, 1, S, D]
    at_slot = inside[..., None, None].expand(*inside.shape, 1, key.shape[-1])
    key, value = (x.gather(-2, at_slot)[..., 0, 0, :].masked_fill(~some, 0) for x in (key, value))
    return key, value
