"""`reference.attend` on the CPU, in C.

`decode` is made for few queries (up to about 16): each stored key and value is read once for all queries of its KV
head, and slots that no query sees are not read at all. `prefill` is made for chunks in bfloat16 on Intel's AMX: slots
that no query of the chunk sees are not read, and masks are taken for whole strips of slots where that is possible;
probabilities are rounded to bfloat16 before they meet the values. Both sum in float32 and share their work among the
threads of torch's OpenMP runtime; where that is not GNU-compatible, one thread works.
"""

import os
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.attention.pages import CODES, Chunk, Pages, Scoring

try:
    from octavo.attention.cpu import _kernels
except ImportError:  # built without a C compiler
    BUILT = AMX = False
else:
    BUILT, AMX = True, _kernels.amx()

_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_CORES = os.cpu_count() or 1
_REQUEST = struct.Struct("=40q2d")  # job.h's Request


def has_decode(query: Tensor, pages: Pages) -> bool:
    """Whether `decode` takes these: on the CPU, in dtypes it knows."""
    known = query.dtype in _CODE and query.dtype not in CODES and pages.key.dtype in _CODE
    return BUILT and known and query.is_cpu and pages.key.is_cpu


def has_prefill(query: Tensor, pages: Pages) -> bool:
    """Whether `prefill` takes these: bfloat16 (pages: or codes) on the CPU, head dimension a multiple of 32 up to 256.

    False where processor or system do not grant AMX.
    """
    D = query.shape[-1]
    stored = pages.key.dtype
    known = query.dtype == torch.bfloat16 and (stored == torch.bfloat16 or stored in CODES)
    return AMX and known and query.is_cpu and pages.key.is_cpu and D % 32 == 0 and 32 <= D <= 256


def decode(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32
    length: Tensor,  # [B, H]     int32
    scale: float,
    chunk: Chunk | None = None,
    scoring: Scoring | None = None,
    threads: int | None = None,
) -> Tensor:  # [B, n, Hq, D], dtype of `query`
    """`reference.attend`, made for decoding.

    Queries and chunk share float32, bfloat16 or float16 and may have any strides but the last. `threads` defaults to
    torch's; the result depends on it only in rounding. No gradients. Page ids and lengths are trusted. Raises
    ValueError for tensors of another kind or memory layout, and for a `scale` that is not finite.
    """
    if query.dtype not in _CODE or query.dtype in CODES or pages.key.dtype not in _CODE:
        raise ValueError("attention: queries are float32, bfloat16 or float16, pages these, int8 or float8_e4m3fn")
    return _run(_kernels.decode, query, at, pages, table, length, scale, chunk, scoring, threads)


def prefill(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32
    length: Tensor,  # [B, H]     int32
    scale: float,
    chunk: Chunk | None = None,
    scoring: Scoring | None = None,
    threads: int | None = None,
) -> Tensor:  # [B, n, Hq, D] bfloat16
    """`reference.attend`, made for chunks; as `decode`, but the result does not depend on `threads`.

    Probabilities are rounded to bfloat16, and so are pages of codes when they are widened. Raises ValueError where
    `has_prefill` is false, and for tensors that do not fit each other.
    """
    if not has_prefill(query, pages):
        raise ValueError("attention: needs AMX, bfloat16 on the CPU and a head dimension of 32, 64... 256")
    return _run(_kernels.prefill, query, at, pages, table, length, scale, chunk, scoring, threads)


def _run(
    kernel: Callable[[bytes], None], query: Tensor, at: Tensor, pages: Pages, table: Tensor, length: Tensor,
    scale: float, chunk: Chunk | None, scoring: Scoring | None, threads: int | None,
) -> Tensor:  # fmt: skip
    """Check, pack, run. Written out, not looped: it runs once per layer and token."""
    at = at if at.is_contiguous() else at.contiguous()  # one row of positions, expanded over the batch
    _check(query, at, pages, table, length)
    B, Hq, n, D = query.shape
    key, value, position, expiry, N = 0, 0, 0, 0, 0
    key_step = value_step = (0, 0, 0)
    if chunk is not None:
        if not chunk.position.is_contiguous():
            chunk = chunk._replace(position=chunk.position.contiguous())
        _check_chunk(query, table, chunk)
        key, value = chunk.key.data_ptr(), chunk.value.data_ptr()
        position, expiry, N = chunk.position.data_ptr(), chunk.expiry.data_ptr(), chunk.key.shape[2]
        key_step, value_step = chunk.key.stride()[:3], chunk.value.stride()[:3]  # type: ignore[assignment]
    softcap, sinks = (0.0, None) if scoring is None else _scoring(scoring, Hq)
    out = torch.empty((B, n, Hq, D), dtype=query.dtype)
    request = _REQUEST.pack(  # addresses: what they point to must outlive the call below
        query.data_ptr(),
        out.data_ptr(),
        at.data_ptr(),
        pages.key.data_ptr(),
        pages.value.data_ptr(),
        0 if pages.key_scale is None else pages.key_scale.data_ptr(),
        0 if pages.value_scale is None else pages.value_scale.data_ptr(),
        pages.position.data_ptr(),
        pages.expiry.data_ptr(),
        table.data_ptr(),
        length.data_ptr(),
        key,
        value,
        position,
        expiry,
        0 if sinks is None else sinks.data_ptr(),
        *(B, Hq, table.shape[1], n, N, D, pages.key.shape[1]),
        *query.stride()[:3],
        *key_step,
        *value_step,
        pages.key.stride(0) * pages.key.element_size(),
        *table.stride()[:2],
        *length.stride(),
        _CODE[query.dtype],
        _CODE[pages.key.dtype],
        min(torch.get_num_threads(), _CORES) if threads is None else threads,
        scale,
        softcap,
    )
    kernel(request)
    return out


def _scoring(scoring: Scoring, heads: int) -> tuple[float, Tensor | None]:
    """(softcap, 0 for none; sinks float32 [heads]) as C reads them. Raises ValueError for impossible ones."""
    softcap, sinks = scoring
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: scores cannot be capped at {softcap}")
    if sinks is not None and not (sinks.shape == (heads,) and sinks.is_cpu):
        raise ValueError("attention: there is one sink for each query head, on the CPU")
    return softcap or 0.0, None if sinks is None else sinks.detach().float().contiguous()


def _check(query: Tensor, at: Tensor, pages: Pages, table: Tensor, length: Tensor) -> None:
    """Raise ValueError unless these fit each other and lie as C reads them, since C trusts them."""
    B, Hq, n, D = query.shape
    P, S, _ = pages.key.shape
    H = table.shape[1]
    key, value, position, expiry = pages.key, pages.value, pages.position, pages.expiry
    if not (
        value.shape == (P, S, D) == key.shape
        and position.shape == expiry.shape == (P, S)
        and at.shape == (B, n)
        and table.shape[:2] == (B, H) == length.shape
        and H > 0
        and Hq % H == 0
    ):
        raise ValueError("attention: shapes do not fit each other")
    if not (
        key.dtype == value.dtype
        and torch.int32 == at.dtype == position.dtype == expiry.dtype == table.dtype == length.dtype
    ):
        raise ValueError("attention: keys and values share one dtype, the rest is int32")
    step = key.stride(0) * key.element_size()
    if not (
        query.is_cpu
        and at.is_cpu
        and key.is_cpu
        and value.is_cpu
        and position.is_cpu
        and expiry.is_cpu
        and table.is_cpu
        and length.is_cpu
        and query.stride(3) == 1 == table.stride(2)
        and key.stride()[1:] == value.stride()[1:] == (D, 1)
        and position.stride(1) == expiry.stride(1) == 1
        and value.stride(0) == key.stride(0)
        and position.stride(0) * 4 == expiry.stride(0) * 4 == step
    ):
        raise ValueError("attention: tensors must be on the CPU, pages laid out as PageLayout does")
    if pages.key_scale is pages.value_scale is None and key.dtype not in CODES:
        return
    for scales in (pages.key_scale, pages.value_scale):
        if (scales is not None) != (key.dtype in CODES):
            raise ValueError("attention: pages of codes have scales, others have none")
        if scales is not None and not (
            scales.dtype == torch.float32
            and scales.shape == (P, S)
            and scales.is_cpu
            and scales.stride(0) * 4 == step
            and scales.stride(1) == 1
        ):
            raise ValueError("attention: page scales are float32 [P, S], laid out as PageLayout does")


def _check_chunk(query: Tensor, table: Tensor, chunk: Chunk) -> None:
    """The same for the new tokens."""
    B, H, D = query.shape[0], table.shape[1], query.shape[3]
    key, value, position, expiry = chunk
    N = position.shape[-1]
    if not (key.shape == value.shape == (B, H, N, D) and position.shape == (B, N) and expiry.shape == (B, H, N)):
        raise ValueError("attention: shapes of the chunk do not fit")
    if not (key.dtype == value.dtype == query.dtype and position.dtype == expiry.dtype == torch.int32):
        raise ValueError("attention: the chunk has the dtype of the queries, its positions and expiries are int32")
    if not (
        key.is_cpu
        and value.is_cpu
        and position.is_cpu
        and expiry.is_cpu
        and key.stride(3) == value.stride(3) == 1
        and expiry.is_contiguous()
    ):
        raise ValueError("attention: the chunk must be on the CPU, its expiries contiguous")


def isa() -> str:
    """What `decode` runs on: `scalar` (whatever the compiler assumes), `avx2` or `avx512`."""
    return _kernels.isa()
