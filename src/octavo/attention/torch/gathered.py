"""Attention of one query per sequence over pages in plain torch: what several layers see is copied out at once.

A decode step on a GPU waits for launches, so a layer may cost no more of them than a cache of plain tensors does. The
keys and values of many layers are therefore gathered together, with one mask; a layer then puts its new token beside
them and attends.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.pages import Pages
from octavo.attention.pages import rows as rows_of

EXTRA = 8  # columns behind the gathered slots: the new token and zeros, since kernels want multiples of 8


class Gathered(NamedTuple):
    """Slots of l layers in rows of U, and EXTRA columns behind them."""

    key: Tensor  # [l, B, H, U + EXTRA, D] of the dtype that attention computes in
    value: Tensor  # [l, B, H, U + EXTRA, D]
    mask: Tensor  # [l, B, H, 1, U + EXTRA]: 0 where the query sees a slot, else -inf


def suits(pages: Pages, queries: int) -> bool:
    """Whether so many queries per sequence should take this way: one, on a GPU."""
    return pages.key.is_cuda and queries == 1


def gather(pages: Pages, table: Tensor, length: Tensor, at: Tensor, dtype: torch.dtype) -> Gathered:
    """What queries at `at` [B, 1] int32 see of rows with `table` [B, l, H, M] and `length` [B, l, H] int32.

    The slot at position `at` itself is left out: `attend` puts that token beside the others. Holds the bytes of these
    slots in `dtype`, and for a moment as much again.
    """
    table, length = table.transpose(0, 1), length.transpose(0, 1)
    rows, U = table.shape[:3], table.shape[3] * pages.key.shape[1]
    made = []
    for found in rows_of(pages, table, dtype):
        whole = torch.empty(*rows, U + EXTRA, found.shape[-1], dtype=dtype, device=found.device)
        whole[..., U:, :].zero_()
        whole[..., :U, :].copy_(found.flatten(3, 4))
        made.append(whole)
    position, expiry = pages.position[table].flatten(3), pages.expiry[table].flatten(3)
    now = at[:, :, None]  # [B, 1, 1]
    used = torch.arange(U, device=table.device) < length[..., None]
    hidden = ~(used & (position >= 0) & (position < now) & (now <= expiry))
    mask = torch.zeros(*rows, 1, U + EXTRA, dtype=dtype, device=table.device)
    mask[..., 0, :U].masked_fill_(hidden, float("-inf"))
    mask[..., U + 1 :] = float("-inf")
    return Gathered(made[0], made[1], mask)


def attend(gathered: Gathered, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`reference.attend` of one query per sequence [B, Hq, 1, D] in one of the gathered layers, [B, 1, Hq, D].

    `key` and `value` [B, H, 1, D] are the new token's. Of a query that is padding the output has no meaning.
    """
    B, Hq, _, D = query.shape
    k, v, mask = gathered.key[layer], gathered.value[layer], gathered.mask[layer]
    H, U = k.shape[1], k.shape[2] - EXTRA
    k[:, :, U : U + 1].copy_(key)
    v[:, :, U : U + 1].copy_(value)
    # Keys are expanded to query heads: folding the queries of a group into one row instead made SDPA 5 times slower.
    k, v, mask = (t.view(B * H, 1, *t.shape[2:]).expand(-1, Hq // H, -1, -1) for t in (k, v, mask))
    rows = query.reshape(B * H, Hq // H, 1, D)
    if query.is_cuda:  # asking for the kernel by name saves the host the choice
        out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(rows, k, v, mask, False, scale=scale)[0]
    else:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(B, 1, Hq, D)
