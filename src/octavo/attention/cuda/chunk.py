"""Attention of a piece of a prompt on a GPU: to its sequence's pages, and to itself under eviction.

A token that is marked is forgotten after `window` more. So a query sees everything near it, and of what lies further
back in the chunk only what is kept for ever. A block of queries therefore meets three kinds of keys: the slots of its
row, the kept tokens before its band, and the band itself, which is the last `window` tokens and the block's own. The
kept ones are listed first, by `kept`; then neither list nor band needs more than a pass over its keys. At 8x eviction
the list holds an eighth of the chunk.

Sequences of one launch may differ in length: each has a span of the columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.attention.cuda.launch import Launcher
from octavo.attention.cuda.tiles import (
    LOG2E,
    attended,
    capped,
    codes_of,
    for_codes,
    joined,
    number,
    power_of_2,
    precision,
    product,
    scale_of,
    scaled,
    scoring_of,
    stages,
)
from octavo.attention.pages import Pages, Scoring

BLOCK = 64  # keys that are read at once
SCANNED = 1024  # tokens that are listed at once


class Span(NamedTuple):
    """Where each sequence's tokens are: columns `first` to `first + columns`, at positions from `start` on."""

    first: Tensor  # [B] int32
    columns: Tensor  # [B] int32
    start: Tensor  # [B] int32


class Kept(NamedTuple):
    """The tokens of a chunk that are kept for ever, by row."""

    column: Tensor  # [B, H, N] int32, the columns of the kept ones in order
    before: Tensor  # [B, H, ceil(N / BLOCK)] int32, how many of them lie before each multiple of BLOCK


def kept(marked: Tensor, span: Span) -> Kept:
    """List the tokens that are not `marked` (bool [B, H, N]) of each sequence's span."""
    B, H, N = marked.shape
    column = torch.empty(B, H, N, dtype=torch.int32, device=marked.device)
    before = torch.empty(B, H, -(-N // BLOCK), dtype=torch.int32, device=marked.device)
    if marked.numel():
        tables = marked.view(torch.uint8), span.first, span.columns, column, before
        _launch_list((B * H, 1, 1), (), tables, 0.0, (N, *marked.stride()), (H, BLOCK, SCANNED), num_warps=4)
    return Kept(column, before)


def attend(
    query: Tensor,  # [B, Hq, n, D], of the last n columns
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    span: Span,
    scale: float,
    marked: Tensor | None = None,  # [B, H, N] bool: forgotten after `window` more, None: none is
    window: int = 0,
    pages: Pages | None = None,  # None: nothing is cached
    table: Tensor | None = None,  # [B, H, M] int32
    length: Tensor | None = None,  # [B, H] int32
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D]
    """`reference.attend` of the last n tokens of a chunk. Columns outside a sequence's span give zeros.

    All slots of a row lie before its chunk. The host does not wait for the device.
    """
    (B, Hq, n, D), (_, H, N, _) = query.shape, key.shape
    out = torch.empty(B, n, Hq, D, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    listed = None if marked is None else kept(marked, span)
    some = query if pages is None else pages.key  # what stands for what is not there, since a kernel takes no None
    stored = pages or Pages(some, some, None, None, span.first, span.first)
    table = span.first if table is None else table
    length = span.first if length is None else length
    sinks, cap, sunk = scoring_of(scoring, span.first)
    exact = query.dtype == torch.float32
    tall = 64 if exact or not query.is_cuda else 128
    block = 32 if exact and query.is_cuda else BLOCK  # registers and memory of a core suffice for no more
    _launch_attend(
        (-(-n // tall), Hq, B),
        (query, key, value, stored.key, stored.value, scale_of(stored.key_scale, stored),
         scale_of(stored.value_scale, stored), stored.expiry, out),
        (span.first if marked is None else marked.view(torch.uint8), span.first if listed is None else listed.column,
         span.first if listed is None else listed.before, span.first, span.columns, span.start, table, length, sinks),
        scale * LOG2E,
        (window, n, N, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
         *(marked.stride() if marked is not None else (0, 0, 0)),
         *((*table.stride()[:2], *length.stride()) if pages is not None else (0, 0, 0, 0)),
         stored.key.stride(0), stored.expiry.stride(0), *out.stride()[:2]),
        (Hq // H, D, power_of_2(D), stored.key.shape[1], tall, block, BLOCK, marked is not None,
         pages is not None, 0 if pages is None else codes_of(pages), precision(query), cap, sunk),
        num_warps=8 if tall == 128 and D > 64 else 4, num_stages=stages(2 if exact else 3, key, query),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=["marked", "span_first", "span_count", "column", "before"])
def _list(
    marked, span_first, span_count, column, before, _, N, marked_b, marked_h, marked_n,
    H: tl.constexpr, BLOCK: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, h = row // H, row % H
    first = tl.load(span_first + b)
    last = first + tl.load(span_count + b)
    marks, to = marked + b.to(tl.int64) * marked_b + h * marked_h, column + row.to(tl.int64) * N
    counts = before + row * tl.cdiv(N, BLOCK)
    found = 0
    for some in range(0, N, SCANNED):
        c = some + tl.arange(0, SCANNED)
        inside = (c >= first) & (c < last)
        stays = inside & (tl.load(marks + c * marked_n, mask=inside, other=1) == 0)
        one = stays.to(tl.int32)
        rank = found + tl.cumsum(one, 0)
        tl.store(to + rank - 1, c, mask=stays)
        tl.store(counts + c // BLOCK, rank - one, mask=(c % BLOCK == 0) & (c < N))
        found += tl.sum(one)


@triton.jit(
    do_not_specialize_on_alignment=[
        "marked", "column", "before", "span_first", "span_count", "span_start", "table", "length", "sinks",
    ],
)  # fmt: skip
def _attend(
    query, key, value, page_k, page_v, page_k_scale, page_v_scale, page_expiry, out,
    marked, column, before, span_first, span_count, span_start, table, length, sinks,
    scale,
    window, n, N, query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    marked_b, marked_h, marked_n, table_b, table_h, length_b, length_h, page_key, page_slot, out_b, out_n,
    G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, S: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr, EVICTS: tl.constexpr, PAGED: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most, so they begin first
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = head // G
    heads = tl.num_programs(1) // G
    d = tl.arange(0, WIDE)
    line = tile * TALL + tl.arange(0, TALL)
    at = N - n + line  # columns of the queries
    first, start = tl.load(span_first + b), tl.load(span_start + b)
    last = first + tl.load(span_count + b)
    asks = (line < n) & (at >= first) & (at < last)
    top, bottom = tl.maximum(N - n + tile * TALL, first), tl.minimum(N - n + (tile + 1) * TALL, last)
    m = tl.full([TALL], -1e30, tl.float32)
    s = tl.zeros([TALL], tl.float32)
    acc = tl.zeros([TALL, WIDE], tl.float32)
    if top < bottom:
        from_query = query + b * query_b + head * query_h + line * query_n
        q = tl.load(from_query[:, None] + d[None, :], mask=asks[:, None] & (d[None, :] < D), other=0.0)
        if PAGED:
            coded_q, shrunk = for_codes(q, CODES, PRECISION)
            now = start + at - first
            used = tl.load(length + b * length_b + h * length_h)
            names = table + b * table_b + h * table_h
            for some in range(0, used, BLOCK):
                slot = some + tl.arange(0, BLOCK)
                ok = slot < used
                page = tl.load(names + slot // S, mask=ok, other=0).to(tl.int64)
                place = page * page_slot + slot % S
                until = tl.load(page_expiry + place, mask=ok, other=-1)
                where = (page * page_key + (slot % S) * D)[:, None] + d[None, :]
                inside = ok[:, None] & (d[None, :] < D)
                k = number(tl.load(page_k + where, mask=inside, other=0.0), coded_q, CODES, PRECISION)
                v = number(tl.load(page_v + where, mask=inside, other=0.0), coded_q, CODES, PRECISION)
                x = product(coded_q, tl.trans(k), PRECISION) * scale
                if CODES > 0:
                    x = x * shrunk[:, None] * tl.load(page_k_scale + place, mask=ok, other=0.0)[None, :]
                x = tl.where(now[:, None] <= until[None, :], capped(x, CAP), float("-inf"))
                p, m, s, acc = attended(x, m, s, acc)
                if CODES > 0:
                    p, largest = scaled(p, tl.load(page_v_scale + place, mask=ok, other=0.0))
                    acc += product(p.to(coded_q.dtype), v, PRECISION) * largest
                else:
                    acc += product(p.to(coded_q.dtype), v, PRECISION)
        from_key, from_value = key + b * key_b + h * key_h, value + b * value_b + h * value_h
        near = first // BLOCK * BLOCK
        if EVICTS:
            near = tl.maximum(near, (top - window) // LISTED * LISTED)
            row = b * heads + h
            if near > first:
                far = tl.load(before + row * tl.cdiv(N, LISTED) + near // LISTED)
                for some in range(0, far, BLOCK):
                    each = some + tl.arange(0, BLOCK)
                    ok = each < far
                    c = tl.load(column + row * N + each, mask=ok, other=0)
                    inside = ok[:, None] & (d[None, :] < D)
                    k = tl.load(from_key + c[:, None] * key_n + d[None, :], mask=inside, other=0.0)
                    v = tl.load(from_value + c[:, None] * value_n + d[None, :], mask=inside, other=0.0)
                    x = capped(product(q, tl.trans(k), PRECISION) * scale, CAP)
                    x = tl.where(ok[None, :], x, float("-inf"))
                    p, m, s, acc = attended(x, m, s, acc)
                    acc += product(p.to(q.dtype), v, PRECISION)
        for some in range(near, bottom, BLOCK):
            c = some + tl.arange(0, BLOCK)
            ok = (c >= first) & (c < bottom)
            inside = ok[:, None] & (d[None, :] < D)
            k = tl.load(from_key + c[:, None] * key_n + d[None, :], mask=inside, other=0.0)
            v = tl.load(from_value + c[:, None] * value_n + d[None, :], mask=inside, other=0.0)
            seen = ok[None, :] & (c[None, :] <= at[:, None])
            if EVICTS:
                marks = tl.load(marked + b * marked_b + h * marked_h + c * marked_n, mask=ok, other=0)
                seen = seen & ((marks[None, :] == 0) | (at[:, None] - c[None, :] <= window))
            x = tl.where(seen, capped(product(q, tl.trans(k), PRECISION) * scale, CAP), float("-inf"))
            p, m, s, acc = attended(x, m, s, acc)
            acc += product(p.to(q.dtype), v, PRECISION)
    s = joined(s, m, sinks, head, SINKS)
    acc = tl.where(asks[:, None], acc / tl.maximum(s, 1e-30)[:, None], 0.0)
    to = out + b * out_b + line.to(tl.int64) * out_n + head * D
    tl.store(to[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=(line < n)[:, None] & (d[None, :] < D))


_launch_list, _launch_attend = Launcher(_list), Launcher(_attend)
