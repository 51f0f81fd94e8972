"""A few new tokens over ragged pages on a GPU: all rows at once, padded to the longest, through one SDPA call.

A dozen operators per layer whatever the number of rows, where a loop over rows would cost a dozen for each: at
few queries a GPU waits for launches, not for memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    query: Tensor,  # [B, Hq, n, D] of the last n <= N new tokens
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    position: Tensor,  # [B, N]      int32, -1 is padding
    expiry: Tensor,  # [B, H, N]     int32
    k_pages: Tensor,  # [P, S, D]
    v_pages: Tensor,  # [P, S, D]
    slot_position: Tensor,  # [P, S] int32; unused: the past lies before every new token
    slot_expiry: Tensor,  # [P, S]   int32
    page_table: Tensor,  # [B, H, M] int32
    length: Tensor,  # [B, H]        int32
    longest: int,  # of all rows, known on the host
    scale: float,
) -> Tensor:  # [B, n, Hq, D]
    """The same function as `reference.paged_attention`, for small n; slots must be older than the new tokens.

    Holds B * H * (longest + N) keys and values, and a mask for n * Hq / H queries on each.
    """
    B, Hq, n, D = query.shape
    H, N, S = *key.shape[1:3], k_pages.shape[1]
    group = Hq // H
    k, v, at = key, value, position[:, None, N - n :, None]  # at: [B, 1, n, 1]
    # A padded query may see itself, so that no softmax is empty; its output is cleared below.
    itself = torch.eye(N, dtype=torch.bool, device=query.device)[N - n :]
    real = (position >= 0)[:, None, None] & (position[:, None, None] <= at)
    seen = (at <= expiry[:, :, None]) & real | itself  # [B, H, n, N]
    if longest:
        table = page_table[:, :, : -(-longest // S)].long()
        empty = torch.arange(table.shape[2] * S, device=query.device) >= length[..., None]  # [B, H, U]
        until = slot_expiry[table].flatten(2).masked_fill(empty, -2)
        # Empty slots are uninitialised memory; a NaN there would outlive its zero weight.
        k_past = k_pages[table].flatten(2, 3).masked_fill(empty[..., None], 0.0)
        v_past = v_pages[table].flatten(2, 3).masked_fill(empty[..., None], 0.0)
        k, v = torch.cat([k_past.to(key.dtype), key], 2), torch.cat([v_past.to(value.dtype), value], 2)
        seen = torch.cat([at <= until[:, :, None], seen], 3)  # [B, H, n, U + N]
    rows = query.reshape(B, H, group * n, D)
    mask = seen[:, :, None].expand(-1, -1, group, -1, -1).reshape(B, H, group * n, -1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    out = out.view(B, Hq, n, D).transpose(1, 2)
    return out.masked_fill((position < 0)[:, N - n :, None, None], 0.0)
