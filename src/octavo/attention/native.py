"""Attention over ragged pages on the CPU, in C: `reference.paged_attention`, made for decoding.

Each cached key and value is read once for all queries of its KV head, and slots that no query sees are not
read at all. Made for few new tokens (up to about 16): more are right too, but faster in torch's SDPA. Work
is shared among the threads of torch's OpenMP runtime; where that is not GNU-compatible, one thread works.
"""

import os

import torch
from torch import Tensor

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
    P, S, _ = k_pages.shape
    dtype, page_dtype = query.dtype, k_pages.dtype
    q_step, k_step, v_step = query.stride(), key.stride(), value.stride()
    if not position.is_contiguous():  # one row of positions, expanded over the batch
        position = position.contiguous()
    if not (
        key.shape == value.shape == (B, H, N, D)
        and v_pages.shape == (P, S, D) == k_pages.shape
        and slot_position.shape == slot_expiry.shape == (P, S)
        and position.shape == (B, N)
        and expiry.shape == (B, H, N)
        and length.shape == (B, H) == page_table.shape[:2]
        and Hq % H == 0
    ):
        raise ValueError("paged_attention: shapes do not fit each other")
    if not (
        dtype == key.dtype == value.dtype
        and page_dtype == v_pages.dtype
        and dtype in _CODE
        and page_dtype in _CODE
        and torch.int32
        == position.dtype
        == expiry.dtype
        == slot_position.dtype
        == slot_expiry.dtype
        == page_table.dtype
        == length.dtype
    ):
        raise ValueError("paged_attention: dtypes are float32, bfloat16 or float16, and int32")
    if not (
        query.is_cpu
        and key.is_cpu
        and k_pages.is_cpu
        and q_step[3] == k_step[3] == v_step[3] == 1
        and expiry.is_contiguous()
        and k_pages.is_contiguous()
        and v_pages.is_contiguous()
        and slot_position.is_contiguous()
        and slot_expiry.is_contiguous()
        and page_table.is_contiguous()
        and length.is_contiguous()
    ):
        raise ValueError("paged_attention: tensors must be on the CPU, pages and tables contiguous")
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
        *q_step[:3],
        *k_step[:3],
        *v_step[:3],
        _CODE[dtype],
        _CODE[page_dtype],
        min(torch.get_num_threads(), _CORES) if threads is None else threads,
        scale,
    )
    return out
