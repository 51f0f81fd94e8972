"""Attention of a chunk over ragged pages in bfloat16, in C on Intel's AMX: `reference.paged_attention` for prefill.

Slots that no query of the chunk sees are not read, and few of those are that only some queries see: what
expires within the chunk, and the chunk itself, is masked by whole strips of slots where that is possible.
Probabilities are rounded to bfloat16 before they meet the values; all sums are float32. Work is shared
among the threads of torch's OpenMP runtime; where that is not GNU-compatible, one thread works.
"""

import os

import torch
from torch import Tensor

from octavo.attention.arguments import check

try:
    from octavo.attention import _prefill
except ImportError:  # built without a C compiler, or with one that does not know AMX
    _usable = False
else:
    _usable = _prefill.usable()

_CORES = os.cpu_count() or 1


def available(dtype: torch.dtype) -> bool:
    """Whether the extension was built, and processor and system grant AMX, for `dtype` (bfloat16 alone)."""
    return _usable and dtype == torch.bfloat16


def supported(
    query: Tensor,  # [B, Hq, N, D]
    k_pages: Tensor,  # [P, S, D]
) -> bool:
    """Whether `paged_attention` takes these: bfloat16 on the CPU, head dimension a multiple of 32 up to 256."""
    D = query.shape[-1]
    return (
        available(query.dtype)
        and k_pages.dtype == torch.bfloat16
        and query.is_cpu
        and k_pages.is_cpu
        and D % 32 == 0
        and 32 <= D <= 256
    )


def paged_attention(
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, H, N, D]   this forward's tokens
    value: Tensor,  # [B, H, N, D]
    position: Tensor,  # [B, N]      int32, -1 is padding
    expiry: Tensor,  # [B, H, N]     int32
    k_pages: Tensor,  # [P, S, D]    the pool
    v_pages: Tensor,  # [P, S, D]
    slot_position: Tensor,  # [P, S] int32
    slot_expiry: Tensor,  # [P, S]   int32
    page_table: Tensor,  # [B, H, M] int32, page ids of each row
    length: Tensor,  # [B, H]        int32, slots in use of each row
    scale: float,
    threads: int | None = None,
) -> Tensor:  # [B, N, Hq, D]
    """Exact attention of N new tokens over their cached past and themselves; all but the indices is bfloat16.

    `query`, `key` and `value` may have any strides but the last. `threads` defaults to torch's; the result
    does not depend on it. No gradients. Page ids and lengths are trusted. Raises ValueError for tensors of
    another kind, and where `supported` is false.
    """
    B, Hq, N, D = query.shape
    H = key.shape[1]
    S = k_pages.shape[1]
    if not supported(query, k_pages):
        raise ValueError("paged_attention: needs AMX, bfloat16 on the CPU and a head dimension of 32, 64... 256")
    if not position.is_contiguous():  # one row of positions, expanded over the batch
        position = position.contiguous()
    past = (k_pages, v_pages, slot_position, slot_expiry, page_table, length)
    check(query, key, value, position, expiry, *past)
    out = torch.empty((B, N, Hq, D), dtype=torch.bfloat16)
    _prefill.paged_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        position.data_ptr(),
        expiry.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        slot_position.data_ptr(),
        slot_expiry.data_ptr(),
        page_table.data_ptr(),
        length.data_ptr(),
        *(B, Hq, H, N, D, S, page_table.shape[2]),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        min(torch.get_num_threads(), _CORES) if threads is None else threads,
        scale,
    )
    return out
