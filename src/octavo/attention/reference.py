"""Attention over ragged pages, written to be read: the definition every fast kernel is tested against.

Every cached slot of a KV head carries `position` and `expiry`, and one rule decides what a query sees:

    a query at position q sees a slot  iff  position <= q <= expiry

The tokens of the running forward are not in the pages yet; they take part with their own position and
expiry under the same rule. `position` -1 marks padding: such a token is seen by nobody and attends to
nothing (its output is zero).
"""

import torch
from torch import Tensor


def paged_attention(
    query: Tensor,  # [B, Hq, n, D]  of the last n <= N of them
    key: Tensor,  # [B, H, N, D]   this forward's tokens
    value: Tensor,  # [B, H, N, D]
    position: Tensor,  # [B, N]      int32, -1 is padding
    expiry: Tensor,  # [B, H, N]     int32
    k_pages: Tensor,  # [P, S, D]    the pool, any floating dtype
    v_pages: Tensor,  # [P, S, D]
    slot_position: Tensor,  # [P, S] int32
    slot_expiry: Tensor,  # [P, S]   int32
    page_table: Tensor,  # [B, H, M] int32, page ids of each row
    length: Tensor,  # [B, H]        int32, slots in use of each row
    scale: float,
) -> Tensor:  # [B, n, Hq, D], dtype of `query`
    """Exact attention of the last n of N new tokens over their cached past and themselves, one row at a time.

    Query head j reads KV head j // (Hq // H). Scores, softmax and sums are computed in float64 when the
    inputs are float64, in float32 otherwise.
    """
    B, Hq, n, D = query.shape
    H, N = key.shape[1:3]
    group = Hq // H
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(B, n, Hq, D)
    for b in range(B):
        for h in range(H):
            used = int(length[b, h])
            pages = page_table[b, h, : -(-used // k_pages.shape[1])].long()
            k = torch.cat([k_pages[pages].flatten(0, 1)[:used].to(wide), key[b, h].to(wide)])  # [U+N, D]
            v = torch.cat([v_pages[pages].flatten(0, 1)[:used].to(wide), value[b, h].to(wide)])
            pos = torch.cat([slot_position[pages].flatten()[:used], position[b]])  # [U+N]
            exp = torch.cat([slot_expiry[pages].flatten()[:used], expiry[b, h]])
            at = position[b, N - n :, None]  # [n, 1]
            visible = (pos >= 0) & (pos <= at) & (at <= exp)  # [n, U+N]
            q = query[b, h * group : (h + 1) * group].to(wide)  # [G, n, D]
            scores = (q @ k.T * scale).masked_fill(~visible, float("-inf"))
            weights = scores.softmax(-1).nan_to_num(0.0)  # a padded query sees nothing
            out[b, :, h * group : (h + 1) * group] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out
