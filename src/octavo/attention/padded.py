"""New tokens over ragged pages on a GPU: all rows at once, padded to the longest, through torch's SDPA.

A dozen operators per layer whatever the number of rows, where a loop over rows costs a dozen for each: up to
thousands of queries a GPU waits for launches, not for products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASK = 2**27  # elements of a mask that is made at once; longer chunks go in blocks of queries


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
    """The same function as `reference.paged_attention`; slots must be older than the new tokens.

    Holds B * H * (longest + N) keys and values beside the pages, and a mask of at most `MASK` elements, or one
    query's where that is more.
    """
    B, Hq, n, D = query.shape
    if query.numel() == 0:
        return query.transpose(1, 2)
    H, N, S = *key.shape[1:3], k_pages.shape[1]
    k, v = key, value
    past = expiry[:, :, :0]  # when cached slots expire, [B, H, U]
    if longest:
        table = page_table[:, :, : -(-longest // S)].long()
        empty = torch.arange(table.shape[2] * S, device=query.device) >= length[..., None]  # [B, H, U]
        past = slot_expiry[table].flatten(2).masked_fill(empty, -2)
        # Empty slots are uninitialised memory; a NaN there would outlive its zero weight.
        k_past = k_pages[table].flatten(2, 3).masked_fill(empty[..., None], 0.0)
        v_past = v_pages[table].flatten(2, 3).masked_fill(empty[..., None], 0.0)
        k, v = torch.cat([k_past.to(key.dtype), key], 2), torch.cat([v_past.to(value.dtype), value], 2)
    rows = query.reshape(B * H, Hq // H, n, D)
    k, v = (t.flatten(0, 1)[:, None].expand(-1, Hq // H, -1, -1) for t in (k, v))
    columns = torch.arange(N, device=query.device)
    block = max(1, MASK // (B * H * k.shape[2]))
    parts = []
    for start in range(N - n, N, block):
        end = min(start + block, N)
        at = position[:, None, start:end, None]  # [B, 1, m, 1]
        causal = (position >= 0)[:, None, None] & (position[:, None, None] <= at)
        # A padded query may see itself, so that no softmax is empty; its output is cleared below.
        seen = causal & (at <= expiry[:, :, None]) | (columns == columns[start:end, None])  # [B, H, m, N]
        seen = torch.cat([at <= past[:, :, None], seen], 3).flatten(0, 1)[:, None]  # [B * H, 1, m, U + N]
        queries = rows[:, :, start - (N - n) : end - (N - n)]
        parts.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=seen, scale=scale))
    out = (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).reshape(B, Hq, n, D).transpose(1, 2)
    return out.masked_fill((position < 0)[:, N - n :, None, None], 0.0)
