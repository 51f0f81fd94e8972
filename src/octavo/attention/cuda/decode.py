"""Attention of a few queries per sequence over ragged pages on a GPU, read once and in equal shares.

Rows, which are (sequence, KV head), differ in length by hundreds of times. So the slots of all rows are laid one after
another in blocks, and every program takes the same number of blocks, wherever rows begin and end: no program waits for
a long row, and none is started for an empty one. A program attends with all queries of a group at once, so that a key
is read once. Its results for each row that it touched are merged by their log-sum-exp in a second launch.

Programs take shares by their number and rows lie in order, so the part of row r made by program p is at place r + p:
along the shares either r or p grows, hence no place is used twice.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.attention.cuda import BLOCK, begins, stream
from octavo.attention.cuda.launch import Launcher
from octavo.attention.cuda.tiles import (
    LOG2E,
    attended,
    capped,
    coded,
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

TALL = 64  # queries of a group that one program attends with
COUNTED = 1024  # rows that are looked at in one operation
PER_CORE = 4  # programs for each of a GPU's cores, which run at once where each has so many
REGISTERS = 128
MERGED = 64  # parts of a row that are merged in one operation
WARPS, STAGES = 4, 3


class Written(NamedTuple):
    """The one new token of each sequence, to be put into its slot before anybody attends."""

    key: Tensor  # [B, H, 1, D]
    value: Tensor  # [B, H, 1, D]
    slot: Tensor  # [B, H, 1] int32 or int64
    position: Tensor  # [B, 1] int32, -1 is padding: it is not put anywhere


def attend(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32, positions of the queries, -1 is padding
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32
    length: Tensor,  # [B, H]     int32
    scale: float,
    begin: Tensor | None = None,  # [B * H + 1] int32
    new: Written | None = None,
    rows: Tensor | None = None,  # [B] int32
    programs: int | None = None,
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D]
    """`reference.attend` without a chunk. `begin` is what `begins` gives for `length`, None: made here.

    `new`, only where n is 1, is written first: its slot is among the `length` ones, and its position and expiry are
    there already. Then no slot may lie after its sequence's query. `rows`: which lines of `table` and `length` the
    sequences have, -1 where there is none; None: the b-th has line b. `programs`: how many share the work, None: as
    suits the GPU. The host does not wait for the device.
    """
    B, Hq, n, D = query.shape
    H = table.shape[1]
    G, R = Hq // H, B * H
    out = torch.empty(B, n, Hq, D, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    begin = begins(length) if begin is None else begin
    kind = None if scoring is not None else stream.kind_of(query, pages, G, new, rows is not None)
    if kind is not None:
        lines = G
        programs = stream.programs_for(kind, query.device) if programs is None else programs * stream.WARPS
        part = torch.empty((R + programs) * lines * (D + 1), dtype=torch.float32, device=query.device)
        stream.attend(kind, programs, part, out, query, at, pages, table, length, scale, begin, new, rows)
    else:
        lines = -(-G * n // tall_for(G * n)) * tall_for(G * n)
        programs = programs_for(query.device) if programs is None else programs
        part = torch.empty((R + programs) * lines * (D + 1), dtype=torch.float32, device=query.device)
        _attend_in_triton(programs, part, out, query, at, pages, table, length, scale, begin, new, rows, scoring)
    sinks, _, sunk = scoring_of(scoring, begin)
    _launch_merge(
        (R, G * n, 1), (part, out), (begin, sinks), 0.0, (R, programs, *out.stride()[:2]),
        (H, G, n, D, power_of_2(D), lines, MERGED, sunk), num_warps=4,
    )  # fmt: skip
    return out


def tall_for(queries: int) -> int:
    """How many of a group's queries one program of the kernel in Triton attends with."""
    return max(16, min(TALL, power_of_2(queries)))


def _attend_in_triton(
    programs: int, part: Tensor, out: Tensor, query: Tensor, at: Tensor, pages: Pages, table: Tensor, length: Tensor,
    scale: float, begin: Tensor, new: Written | None, rows: Tensor | None, scoring: Scoring | None,
) -> None:  # fmt: skip
    """Write `out` where one program has seen a whole row, else parts, for `_merge`."""
    (B, Hq, n, D), H, S = query.shape, table.shape[1], pages.key.shape[1]
    G, R = Hq // H, B * H
    tall = tall_for(G * n)
    tiles = -(-G * n // tall)
    key, value, slot, position = new or (query, query, length, at)
    sinks, cap, sunk = scoring_of(scoring, begin)
    _launch_attend(
        (programs, tiles, 1),
        (query, pages.key, pages.value, scale_of(pages.key_scale, pages), scale_of(pages.value_scale, pages),
         pages.position, pages.expiry, part, out, key, value),
        (at, table, length, begin, slot, position, at if rows is None else rows, sinks),
        scale * LOG2E,
        (R, *query.stride()[:3], at.stride(0), *table.stride()[:2], *length.stride(), *out.stride()[:2],
         pages.key.stride(0), pages.position.stride(0), *key.stride()[:2], *value.stride()[:2], *slot.stride()[:2],
         position.stride(0)),
        (H, G, n, D, power_of_2(D), S, tall, tiles, BLOCK, power_of_2(min(R, COUNTED)), new is not None,
         rows is not None, codes_of(pages), precision(query), cap, sunk),
        num_warps=WARPS, num_stages=stages(STAGES, pages.key, query), maxnreg=REGISTERS,
    )  # fmt: skip


@cache
def programs_for(device: torch.device) -> int:
    """How many programs share the work of a layer."""
    if device.type != "cuda":  # Triton's interpreter
        return 5
    return PER_CORE * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(
    do_not_specialize_on_alignment=["at", "table", "length", "begins", "new_slot", "new_position", "rows", "sinks"],
    do_not_specialize=["R"],
)
def _attend(
    query, key, value, key_scale, value_scale, position, expiry, part, out, new_key, new_value,
    at, table, length, begins, new_slot, new_position, rows, sinks,
    scale,
    R, query_b, query_h, query_n, at_b, table_b, table_h, length_b, length_h, out_b, out_n, page_key, page_slot,
    new_key_b, new_key_h, new_value_b, new_value_h, new_slot_b, new_slot_h, new_position_b,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, WRITES: tl.constexpr,
    INDEXED: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    program, tile = tl.program_id(0), tl.program_id(1)
    total = tl.load(begins + R).to(tl.int64)
    sharing = tl.minimum(tl.num_programs(0), total)  # so that each of them has something, and leaves a result
    if program >= sharing:
        return
    first = (program * total // sharing).to(tl.int32)
    last = ((program + 1) * total // sharing).to(tl.int32)
    my_first, my_last = first, last
    row = 0  # the row that holds block `first`: how many rows end at or before it
    for some in range(0, R, MANY):
        each = some + tl.arange(0, MANY)
        ends = tl.load(begins + 1 + each, mask=each < R, other=2147483647)
        row += tl.sum((ends <= first).to(tl.int32))
    d = tl.arange(0, WIDE)
    line = tile * ROWS + tl.arange(0, ROWS)  # which query of which head of the group
    real = line < G * N
    while first < last:
        begin, end = tl.load(begins + row), tl.load(begins + row + 1)
        stop = tl.minimum(last, end)
        if first < stop:
            b, h = row // H, row % H
            line_of = b
            if INDEXED:
                line_of = tl.load(rows + b)
            # Of no sequence nothing is read; line 0 stands for it.
            used = tl.load(length + tl.maximum(line_of, 0).to(tl.int64) * length_b + h * length_h)
            used = tl.where(line_of < 0, 0, used)
            names = table + tl.maximum(line_of, 0).to(tl.int64) * table_b + h * table_h
            low, high = (first - begin) * BLOCK, tl.minimum((stop - begin) * BLOCK, used)
            if WRITES:
                taken = tl.load(new_slot + b * new_slot_b + h * new_slot_h).to(tl.int32)
                if (taken >= low) & (taken < high) & (tl.load(new_position + b * new_position_b) >= 0):
                    own = tl.load(names + taken // S).to(tl.int64)
                    new_k = tl.load(new_key + b * new_key_b + h * new_key_h + d, mask=d < D, other=0.0)
                    new_v = tl.load(new_value + b * new_value_b + h * new_value_h + d, mask=d < D, other=0.0)
                    if CODES > 0:
                        new_k, k_scale = coded(new_k, CODES)
                        new_v, v_scale = coded(new_v, CODES)
                        tl.store(key_scale + own * page_slot + taken % S, k_scale)
                        tl.store(value_scale + own * page_slot + taken % S, v_scale)
                    to = own * page_key + (taken % S) * D + d
                    tl.store(key + to, new_k.to(key.dtype.element_ty), mask=d < D)
                    tl.store(value + to, new_v.to(value.dtype.element_ty), mask=d < D)
                tl.debug_barrier()  # the loads below see it
            from_query = query + b.to(tl.int64) * query_b + (h * G + line // N) * query_h + (line % N) * query_n
            q = tl.load(from_query[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0)
            q, shrunk = for_codes(q, CODES, PRECISION)
            now = tl.load(at + b * at_b + line % N, mask=real, other=-1)
            m = tl.full([ROWS], -1e30, tl.float32)
            s = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, WIDE], tl.float32)
            for at_slot in range(low, high, BLOCK):
                # Past the end the last slot is read again and not seen, which is cheaper than asking at each load.
                place_in_row = at_slot + tl.arange(0, BLOCK)
                slot = tl.minimum(place_in_row, high - 1)
                page = tl.load(names + slot // S).to(tl.int64)
                place = page * page_slot + slot % S
                seen = (place_in_row < high)[None, :] & (now[:, None] <= tl.load(expiry + place)[None, :])
                if not WRITES:
                    since = tl.load(position + place)
                    seen = seen & (since[None, :] >= 0) & (since[None, :] <= now[:, None])
                where = (page * page_key + (slot % S) * D)[:, None] + d[None, :]
                if WIDE == D:
                    k, v = tl.load(key + where), tl.load(value + where)
                else:
                    k = tl.load(key + where, mask=d[None, :] < D, other=0.0)
                    v = tl.load(value + where, mask=d[None, :] < D, other=0.0)
                k, v = number(k, q, CODES, PRECISION), number(v, q, CODES, PRECISION)
                x = product(q, tl.trans(k), PRECISION) * scale
                if CODES > 0:
                    x = x * shrunk[:, None] * tl.load(key_scale + place)[None, :]
                p, m, s, acc = attended(tl.where(seen, capped(x, CAP), float("-inf")), m, s, acc)
                if CODES > 0:
                    p, largest = scaled(p, tl.load(value_scale + place))
                    acc += product(p.to(q.dtype), v, PRECISION) * largest
                else:
                    acc += product(p.to(q.dtype), v, PRECISION)
            s = tl.where(now >= 0, s, 0.0)  # padding has seen nothing
            whole = (begin >= my_first) & (end <= my_last)  # nobody else has a part of it
            below = s
            if whole:
                below = joined(s, m, sinks, h * G + tl.minimum(line, G * N - 1) // N, SINKS)
            acc = tl.where(s > 0, 1.0 / tl.maximum(below, 1e-30), 0.0)[:, None] * acc
            inside = real[:, None] & (d[None, :] < D)
            if whole:
                to = out + b.to(tl.int64) * out_b + (line % N) * out_n + (h * G + line // N) * D
                tl.store(to[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
            else:
                mine = (row + program).to(tl.int64) * (TILES * ROWS) + line
                tl.store(part + mine[:, None] * D + d[None, :], acc, mask=inside)
                lse = part + (R + tl.num_programs(0)).to(tl.int64) * (TILES * ROWS * D)
                tl.store(lse + mine, tl.where(s > 0, m + tl.log2(tl.maximum(s, 1e-30)), -1e30), mask=real)
        first = stop
        row += 1


@triton.jit(do_not_specialize_on_alignment=["begins", "sinks"], do_not_specialize=["R", "programs"])
def _merge(
    part, out, begins, sinks, _, R, programs, out_b, out_n,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
    AT_ONCE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row, line = tl.program_id(0), tl.program_id(1)
    total = tl.load(begins + R).to(tl.int64)
    begin, end = tl.load(begins + row), tl.load(begins + row + 1)
    sharing = tl.minimum(programs, total)
    first, last = ((begin + 1) * sharing - 1) // total, (end * sharing - 1) // total
    if first == last:
        return  # one program has made all of it
    d = tl.arange(0, WIDE)
    m = tl.full([1], -1e30, tl.float32)
    s = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, WIDE], tl.float32)
    lse = part + (R + programs).to(tl.int64) * (LINES * D)
    for some in range(first, last + 1, AT_ONCE):
        program = some + tl.arange(0, AT_ONCE)
        ok = program <= last
        place = (row + program) * LINES + line
        weight = tl.load(lse + place, mask=ok, other=-1e30)
        x = tl.load(part + place[:, None] * D + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
        top = tl.maximum(m, tl.max(weight, 0, keep_dims=True))
        p = tl.where(weight > -1e29, tl.exp2(weight - top), 0.0)
        shrink = tl.exp2(m - top)
        acc = acc * shrink[:, None] + tl.sum(x * p[:, None], 0, keep_dims=True)
        s = s * shrink + tl.sum(p, 0, keep_dims=True)
        m = top
    to = out + (row // H).to(tl.int64) * out_b + (line % N) * out_n + (row % H * G + line // N) * D
    s = joined(s, m, sinks, row % H * G + line // N, SINKS)
    result = acc / tl.maximum(s, 1e-30)[:, None]
    tl.store(to + d[None, :], result.to(out.dtype.element_ty), mask=d[None, :] < D)


_launch_attend, _launch_merge = Launcher(_attend), Launcher(_merge)
