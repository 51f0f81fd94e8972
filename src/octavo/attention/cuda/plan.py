"""One new token for each sequence of a batch, placed on the GPU: `plan` before the layers, `note` after them.

For each layer and KV head the token takes the slot of a token that has expired, or the next one at the end of its row,
for which a page is popped from the stack of free ones when the last is full. A page that other sequences name too is
copied first. Nothing of it depends on what the host knows, so one CUDA graph serves all steps of a batch size. Which
sequences are in the batch is a tensor too; a place in the batch may be empty.

`octavo.kv.decode_step` is the same in plain torch, and the reference of the tests.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.attention.cuda import BLOCK
from octavo.attention.cuda.launch import Launcher
from octavo.attention.pages import Pages

SEARCHED = 256  # slots that are searched in one operation
COUNTED = 1024  # rows whose blocks are added up in one operation
COPIED = 512  # words of a page that are copied in one operation


class State(NamedTuple):
    """What all sequences have: rows of tables, and the pages that are free. See `octavo.kv.tables` and `.pool`."""

    position: Tensor  # [R] int32
    length: Tensor  # [R, L, H] int32
    lost: Tensor  # [R, L, H] int32
    newest: Tensor  # [R, L, H] int32
    table: Tensor  # [R, L, H, M] int32
    marks: Tensor  # [R, L, H, ring + 1] int32, or [R, L, H, 0] where nothing expires
    raw: Tensor  # [P, words] int64, each page's memory
    references: Tensor  # [P] int32
    free: Tensor  # [P] int32
    free_count: Tensor  # [] int64


class When(NamedTuple):
    """When tokens expire and slots come free; see `octavo.config.Eviction` and `octavo.kv.held`."""

    window: int  # 0: never
    shift: int = 0
    undo: int = 0


class Planned(NamedTuple):
    """Where the new tokens go."""

    at: Tensor  # [B] int32, their positions; -1 where no sequence is
    slot: Tensor  # [B, L, H] int32; -1 there
    begin: Tensor  # [L, B * H + 1] int32, see `octavo.attention.cuda.begins`
    found: Tensor  # [] int32, how many free slots a search has found


def plan(state: State, pages: Pages, rows: Tensor, search: Tensor, when: When) -> Planned:
    """Choose a slot for the next token of the sequences in `rows` [B] int32, each once (-1: none), and count it in.

    `search` [] int32: 0 where `State.marks` names every slot that is free inside a row, else whole rows are searched.
    With `shift` 1 the newest token's slot will be written to as well, so its page is copied where it is shared.
    """
    (B,), (_, L, H, M) = rows.shape, state.table.shape
    at = torch.empty(B, dtype=torch.int32, device=rows.device)
    slot = torch.empty(B, L, H, dtype=torch.int32, device=rows.device)
    begin = torch.empty(L, B * H + 1, dtype=torch.int32, device=rows.device)
    found = torch.zeros((), dtype=torch.int32, device=rows.device)
    S, ring = pages.position.shape[1], state.marks.shape[3] - 1
    _launch_plan(
        (B * L * H, 1, 1), (pages.expiry, state.raw),
        (state.position, state.length, state.lost, state.newest, state.table, state.marks, state.references, state.free,
         state.free_count, rows, search, at, slot, found),
        0.0, (M, pages.expiry.stride(0), state.raw.shape[1]), (L, H, S, ring, *when, SEARCHED, COPIED), num_warps=1,
    )  # fmt: skip
    _launch_place(
        (L, 1, 1), (pages.position, pages.expiry), (state.length, state.table, rows, at, slot, begin), 0.0,
        (B, M, pages.expiry.stride(0)), (L, H, S, BLOCK, COUNTED), num_warps=4,
    )  # fmt: skip
    return Planned(at, slot, begin, found)


def note(state: State, pages: Pages, rows: Tensor, planned: Planned, marked: Tensor | None, when: When) -> None:
    """Write down which of the tokens expire (`marked` [L, B, H] bool, None: none), and move on by one position.

    With `shift` 1 each mark is about the token before.
    """
    (B,), (_, L, H, M) = rows.shape, state.table.shape
    S, ring = pages.position.shape[1], state.marks.shape[3] - 1
    marks = rows if marked is None else marked.view(torch.uint8)
    _launch_note(
        (B * L * H, 1, 1), (pages.expiry,),
        (state.position, state.newest, state.table, state.marks, rows, planned.at, planned.slot, marks),
        0.0, (M, pages.expiry.stride(0), *(marked.stride() if marked is not None else (0, 0, 0))),
        (L, H, S, ring, when.window, when.shift, marked is not None), num_warps=1,
    )  # fmt: skip


@triton.jit
def _popped(references, free, free_count):
    """A page from the stack; the host has made sure that there is one."""
    page = tl.load(free + tl.atomic_add(free_count, -1) - 1)
    tl.store(references + page, 1)
    return page.to(tl.int64)


@triton.jit
def _own(slot, names, raw, references, free, free_count, words, S: tl.constexpr, COPIED: tl.constexpr):
    """Make the page of a slot this row's own. Nobody writes to a shared page meanwhile: all that this launch writes to
    are pages just popped, so several rows may copy one page at once, and the last of them keeps it."""
    page = tl.load(names + slot // S).to(tl.int64)
    if tl.load(references + page) > 1:
        if tl.atomic_add(references + page, -1) > 1:
            mine = _popped(references, free, free_count)
            for some in range(0, words, COPIED):
                word = some + tl.arange(0, COPIED)
                x = tl.load(raw + page * words + word, mask=word < words, other=0)
                tl.store(raw + mine * words + word, x, mask=word < words)
            tl.store(names + slot // S, mine.to(tl.int32))
        else:
            tl.atomic_add(references + page, 1)
    tl.debug_barrier()  # the next look at the row's table sees it


@triton.jit(
    do_not_specialize_on_alignment=[
        "position", "length", "lost", "newest", "table", "marks", "references", "free", "free_count", "rows", "search",
        "at", "slots", "found",
    ],
)  # fmt: skip
def _plan(
    expiry, raw,
    position, length, lost, newest, table, marks, references, free, free_count, rows, search, at, slots, found,
    _, M, page_slot, words,
    L: tl.constexpr, H: tl.constexpr, S: tl.constexpr, RING: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    UNDO: tl.constexpr, SEARCHED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    b, inner = cell // (L * H), cell % (L * H)
    row = tl.load(rows + b).to(tl.int64)
    if row < 0:
        tl.store(slots + cell, -1)
        if inner == 0:
            tl.store(at + b, -1)
        return
    now = tl.load(position + row)
    mine = row * (L * H) + inner
    names, used = table + mine * M, tl.load(length + mine)
    if SHIFT == 1:
        last = tl.load(newest + mine)
        if last >= 0:
            _own(last, names, raw, references, free, free_count, words, S, COPIED)
    limit = tl.maximum(now - UNDO, 0)  # slots that have expired before it are free
    slot = -1
    if WINDOW > 0:
        # The token that expired just before `limit`; early on none, but a place of the ring that is still empty.
        marked = tl.load(marks + mine * (RING + 1) + (now - UNDO - WINDOW - 1 + RING) % RING)
        if (marked >= 0) & (marked < used):
            page = tl.load(names + marked // S).to(tl.int64)
            if tl.load(expiry + page * page_slot + marked % S) < limit:
                slot = marked
    if (slot < 0) & (tl.load(search) != 0):
        nowhere = 2147483647
        first = nowhere
        some = 0
        while (some < used) & (first == nowhere):
            each = some + tl.arange(0, SEARCHED)
            page = tl.load(names + each // S, mask=each < used, other=0).to(tl.int64)
            until = tl.load(expiry + page * page_slot + each % S, mask=each < used, other=nowhere)
            first = tl.min(tl.where(until < limit, each, nowhere), 0)
            some += SEARCHED
        if first != nowhere:
            slot = first
            tl.atomic_add(found, 1)
    if slot >= 0:
        _own(slot, names, raw, references, free, free_count, words, S, COPIED)
        page = tl.load(names + slot // S).to(tl.int64)
        gone = tl.load(expiry + page * page_slot + slot % S)
        tl.store(lost + mine, tl.maximum(tl.load(lost + mine), gone))
    else:
        slot = used
        if slot % S == 0:
            tl.store(names + slot // S, _popped(references, free, free_count).to(tl.int32))
        else:
            _own(slot, names, raw, references, free, free_count, words, S, COPIED)
        tl.store(length + mine, used + 1)
    tl.store(slots + cell, slot)
    if inner == 0:
        tl.store(at + b, now)


@triton.jit(do_not_specialize_on_alignment=["length", "table", "rows", "at", "slots", "begin"])
def _place(
    position, expiry, length, table, rows, at, slots, begin, _, B, M, page_slot,
    L: tl.constexpr, H: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Write positions, now that all pages that had to be copied are, and add up the blocks of a layer's rows."""
    layer = tl.program_id(0)
    to = begin + layer * (B * H + 1)
    tl.store(to, 0)
    before = 0
    for some in range(0, B * H, COUNTED):
        each = some + tl.arange(0, COUNTED)
        row = tl.load(rows + each // H, mask=each < B * H, other=-1).to(tl.int64)
        used = tl.load(length + (row * L + layer) * H + each % H, mask=row >= 0, other=0)
        slot = tl.load(slots + (each // H * L + layer) * H + each % H, mask=row >= 0, other=0)
        line = table + ((row * L + layer) * H + each % H) * M
        page = tl.load(line + slot // S, mask=row >= 0, other=0).to(tl.int64)
        now = tl.load(at + each // H, mask=row >= 0, other=0)
        tl.store(position + page * page_slot + slot % S, now, mask=row >= 0)
        tl.store(expiry + page * page_slot + slot % S, 2147483647, mask=row >= 0)
        blocks = tl.where(each < B * H, tl.maximum((used + BLOCK - 1) // BLOCK, 1), 0)
        tl.store(to + 1 + each, before + tl.cumsum(blocks, 0), mask=each < B * H)
        before += tl.sum(blocks)


@triton.jit(
    do_not_specialize_on_alignment=["position", "newest", "table", "marks", "rows", "at", "slots", "marked"],
)  # fmt: skip
def _note(
    expiry, position, newest, table, marks, rows, at, slots, marked, _, M, page_slot, marked_l, marked_b, marked_h,
    L: tl.constexpr, H: tl.constexpr, S: tl.constexpr, RING: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr,
    DECIDED: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    b, inner = cell // (L * H), cell % (L * H)
    row = tl.load(rows + b).to(tl.int64)
    if row >= 0:
        now, slot = tl.load(at + b), tl.load(slots + cell)
        mine = row * (L * H) + inner
        about, when = slot, now
        if SHIFT == 1:
            about, when = tl.load(newest + mine), now - 1
            tl.store(newest + mine, slot)
        if (WINDOW > 0) & (when >= 0) & (about >= 0):
            doomed = False
            if DECIDED:
                doomed = tl.load(marked + inner // H * marked_l + b * marked_b + inner % H * marked_h) != 0
            page = tl.load(table + mine * M + about // S).to(tl.int64)
            until = tl.where(doomed, when + WINDOW, 2147483647)
            tl.store(expiry + page * page_slot + about % S, until)
            tl.store(marks + mine * (RING + 1) + when % RING, tl.where(doomed, about, -1))
        if inner == 0:
            tl.store(position + row, now + 1)


_launch_plan, _launch_place, _launch_note = Launcher(_plan), Launcher(_place), Launcher(_note)
