"""Which kernel computes the one operation, by device and chunk length."""

import torch
from torch import Tensor

from octavo.attention import native, padded, prefill, ragged

NATIVE_MAX_TOKENS = 16  # above it matrix products beat the streaming kernel


def paged_attention(
    query: Tensor,  # [B, Hq, n, D] of the last n <= N new tokens
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    position: Tensor,  # [B, N]      int32, -1 is padding
    expiry: Tensor,  # [B, H, N]     int32
    k_pages: Tensor,  # [P, S, D]
    v_pages: Tensor,  # [P, S, D]
    slot_position: Tensor,  # [P, S] int32
    slot_expiry: Tensor,  # [P, S]   int32
    page_table: Tensor,  # [B, H, M] int32
    length: Tensor,  # [B, H]        int32
    host_length: list[list[int]],  # the same on the host
    scale: float,
) -> Tensor:  # [B, n, Hq, D]
    """Attention of the last n of N new tokens over their cached past and themselves; see `reference.paged_attention`.

    Gradients reach `query`, `key` and `value` (through the torch path); the pages are constants.
    """
    past = (k_pages, v_pages, slot_position, slot_expiry, page_table)
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    n = query.shape[2]
    # The kernels in C know no gradients, want all new tokens' queries and, unlike autocast, one dtype.
    plain = not trains and n == key.shape[2] and query.dtype == key.dtype == value.dtype
    if plain and n <= NATIVE_MAX_TOKENS and native.supported(query, k_pages):
        return native.paged_attention(query, key, value, position, expiry, *past, length, scale)
    if plain and prefill.supported(query, k_pages):
        return prefill.paged_attention(query, key, value, position, expiry, *past, length, scale)
    if query.is_cuda:
        longest = max(max(row) for row in host_length)
        return padded.paged_attention(query, key, value, position, expiry, *past, length, longest, scale)
    return ragged.paged_attention(query, key, value, position, expiry, *past, host_length, scale)
