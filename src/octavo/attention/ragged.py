"""Chunked prefill over ragged pages: each KV head's compacted past beside the chunk, through torch's SDPA.

The work per row is one matrix product over (live slots + chunk) keys, so what is evicted is never touched:
at 8K tokens and 8x compression a chunk of 512 meets about 1,500 keys, not 8,000.
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
    length: list[list[int]],  # slots in use of each row, on the host: [B][H]
    scale: float,
) -> Tensor:  # [B, n, Hq, D]
    """The same function as `reference.paged_attention`, for N > 1; slots must be older than the chunk."""
    B, Hq, n, D = query.shape
    H, N, S = *key.shape[1:3], k_pages.shape[1]
    group = Hq // H
    out = query.new_empty(B, Hq, n, D)
    inside = torch.arange(S, device=query.device)
    itself = torch.eye(N, dtype=torch.bool, device=query.device)[N - n :]
    for b in range(B):
        at = position[b, N - n :, None]  # [n, 1]
        # A padded query may see itself, so that no softmax is empty; its output is cleared below.
        causal = (position[b] >= 0) & (position[b] <= at) | itself
        last = position[b].max()
        for h in range(H):
            used = length[b][h]
            slots = (page_table[b, h, : -(-used // S), None] * S + inside).flatten()[:used]  # [U]
            until = slot_expiry.view(-1).index_select(0, slots)
            # What every query of the chunk sees comes first and needs no mask: most of the past.
            lasting = until >= last
            order = torch.cat([lasting.nonzero(), (~lasting).nonzero()])[:, 0]
            slots, ends = slots[order], used - int(lasting.sum())
            mask = query.new_zeros(n, used + N)
            _hide(mask[:, used - ends : used], at <= until[order[used - ends :]])
            _hide(mask[:, used:], (at <= expiry[b, h]) & causal)
            k = torch.cat([k_pages.view(-1, D).index_select(0, slots).to(key.dtype), key[b, h]])  # [U+N, D]
            v = torch.cat([v_pages.view(-1, D).index_select(0, slots).to(value.dtype), value[b, h]])
            heads = slice(h * group, (h + 1) * group)
            out[b, heads] = F.scaled_dot_product_attention(
                query[None, b, heads],  # [1, G, n, D]
                k[None, None].expand(1, group, -1, -1),
                v[None, None].expand(1, group, -1, -1),
                attn_mask=mask[None, None],
                scale=scale,
            )[0]
    out = out.transpose(1, 2)
    return out.masked_fill((position < 0)[:, N - n :, None, None], 0.0)


def _hide(mask: Tensor, visible: Tensor) -> None:
    """Write 0 where `visible`, -inf elsewhere."""
    torch.where(visible, mask.new_zeros(()), mask.new_full((), float("-inf")), out=mask)


def first_chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Plain causal attention [B, n, Hq, D] for a first chunk no longer than the window, where nothing expires.

    `query` [B, Hq, n, D] of the last n tokens, `key` and `value` [B, H, N, D].
    """
    n, N = query.shape[2], key.shape[2]
    mask = None  # none is needed for one query, and none is made where queries and keys are the same tokens
    if 1 < n < N:
        mask = torch.ones(n, N, dtype=torch.bool, device=query.device).tril(N - n)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=1 < n == N, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
