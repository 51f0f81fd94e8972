"""Plain causal attention, for a first chunk of which nothing can expire."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention [B, n, Hq, D] of the last n of N tokens to themselves and those before, through SDPA.

    `query` [B, Hq, n, D], `key` and `value` [B, H, N, D] of one dtype, Hq a multiple of H. Gradients reach all three.
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
