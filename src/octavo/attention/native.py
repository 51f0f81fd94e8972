"""Attention over ragged pages on the CPU, in C: `reference.paged_attention`, made for decoding.

Each cached key and value is read once for all queries of its KV head, and slots that no query sees are not
read at all. Made for few new tokens (up to about 16): more are right too, but faster in torch's SDPA. Work
is shared among the threads of torch's OpenMP runtime; where that is not GNU-compatible, one thread works.
"""

import os

import torch
from torch import Tensor

from octavo.attention.arguments import check

try:
    from octavo.attention import _native
except ImportError as error:  # built without a C compiler
    _missing: ImportError | None = error
else:
    _missing = None

_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CORES = os.cpu_count() or 1


def available() -> bool:
    """Whether the extension was built."""
    return _missing is None


def supported(
    query: Tensor,  # [B, Hq, N, D]
    k_pages: Tensor,  # [P, S, D]
) -> bool:
    """Whether `paged_attention` takes these: on the CPU, in dtypes it knows."""
    known = query.dtype in _CODE and k_pages.dtype in _CODE
    return available() and known and query.is_cpu and k_pages.is_cpu


def isa() -> str:
    """The instruction set in use: `scalar` (whatever the compiler assumes), `avx2` or `avx512`."""
    return _native.isa()


def paged_attention(
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, H, N, D]   this forward's tokens
    value: Tensor,  # [B, H, N, D]
    position: Tensor,  # [B, N]      int32, -1 is padding
    expiry: Tensor,  # [B, H, N]     int32
    k_pages: Tensor,  # [P, S, D]    the pool; float32, bfloat16 or float16, whatever `query` is
    v_pages: Tensor,  # [P, S, D]
    slot_position: Tensor,  # [P, S] int32
    slot_expiry: Tensor,  # [P, S]   int32
    page_table: Tensor,  # [B, H, M] int32, page ids of each row
    length: Tensor,  # [B, H]        int32, slots in use of each row
    scale: float,
    threads: int | None = None,
) -> Tensor:  # [B, N, Hq, D], dtype of `query`
    """Exact attention of N new tokens over their cached past and themselves, summed in float32.

    `query`, `key` and `value` share float32, bfloat16 or float16 and may have any strides but the last.
    `threads` defaults to torch's; the result depends on it only in rounding. No gradients. Page ids and
    lengths are trusted. Raises ValueError for tensors of another kind.
    """
    B, Hq, N, D = query.shape
    H = key.shape[1]
    S = k_pages.shape[1]
    if not position.is_contiguous():  # one row of positions, expanded over the batch
        position = position.contiguous()
    past = (k_pages, v_pages, slot_position, slot_expiry, page_table, length)
    check(query, key, value, position, expiry, *past)
    dtype, page_dtype = query.dtype, k_pages.dtype
    if dtype not in _CODE or page_dtype not in _CODE:
        raise ValueError("paged_attention: dtypes are float32, bfloat16 and float16")
    out = torch.empty((B, N, Hq, D), dtype=dtype)
    _native.paged_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        position.data_ptr(),
        expiry.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        0,
        0,
        slot_position.data_ptr(),
        slot_expiry.data_ptr(),
        page_table.data_ptr(),
        length.data_ptr(),
        *(B, Hq, H, N, D, S, page_table.shape[2]),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        _CODE[dtype],
        _CODE[page_dtype],
        min(torch.get_num_threads(), _CORES) if threads is None else threads,
        scale,
    )
    return out
