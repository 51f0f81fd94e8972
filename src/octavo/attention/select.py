"""Which kernel computes the one operation, by device, dtype and number of queries."""

import torch
from torch import Tensor

from octavo.attention import cuda
from octavo.attention.cpu import kernels
from octavo.attention.pages import Chunk, Pages, Scoring
from octavo.attention.torch import padded, ragged

FEW = 16  # queries up to which the streaming kernel is faster than matrix products


def attend(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32, positions of the queries, -1 is padding
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32
    length: Tensor,  # [B, H]     int32
    scale: float,
    chunk: Chunk | None = None,
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D]
    """Attention of n queries over the slots of their rows and a chunk; see `reference.attend`.

    Queries and chunk are float32, bfloat16 or float16, pages may be stored otherwise. Gradients reach `query` and the
    chunk (through the torch paths); pages are constants. Slots in use must be finite, and on a GPU all of the pages.
    Raises ValueError where shapes or memory layouts do not fit each other (C trusts them after that).
    """
    n = query.shape[2]
    new = () if chunk is None else (chunk.key, chunk.value)
    trains = torch.is_grad_enabled() and (query.requires_grad or any(t.requires_grad for t in new))
    sinks = None if scoring is None else scoring.sinks
    trains = trains or (torch.is_grad_enabled() and sinks is not None and sinks.requires_grad)
    # The kernels know no gradients, and those in C, unlike autocast, one dtype.
    if not trains and all(t.dtype == query.dtype for t in new):
        if n <= FEW and kernels.has_decode(query, pages):
            return kernels.decode(query, at, pages, table, length, scale, chunk, scoring)
        if kernels.has_prefill(query, pages):
            return kernels.prefill(query, at, pages, table, length, scale, chunk, scoring)
        if chunk is None and cuda.available(query.device):
            from octavo.attention.cuda import decode

            return decode.attend(query, at, pages, table, length, scale, scoring=scoring)
    if query.is_cuda:
        return padded.attend(query, at, pages, table, length, scale, chunk, scoring)
    return ragged.attend(query, at, pages, table, length, scale, chunk, scoring)
