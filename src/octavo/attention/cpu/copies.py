"""Slots between pages and flat memory on the CPU, in C: what a stored sequence takes to come and go.

`octavo.attention.pages.put`, `slots` and a few operations of torch do the same and are the reference; there each part
of all slots is read and written several times, and rows as long as the longest one are searched.
"""

import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.pages import Pages

try:
    from octavo.attention.cpu import _kernels
except ImportError:  # built without a C compiler
    BUILT = False
else:
    BUILT = True

_CORES = os.cpu_count() or 1
_REQUEST = struct.Struct("=38q")  # copies.h's Copies
NONE = (0,) * len(Pages._fields)


def suits(pages: Pages) -> bool:
    """Whether these pages are on the CPU and there are kernels for it."""
    return BUILT and pages.key.is_cpu


def fill(
    pages: Pages,
    table: Tensor,  # [R, M] int32
    slot: Tensor,  # [R] int64, the first slot of each row that is filled
    stored: Sequence[Tensor | None],  # each [n] or [n, D], as `Pages` names them; without expiries see `window`
    first: Tensor,  # [R] int64, where in these a row's slots begin
    count: Tensor,  # [R] int64, how many follow each other there
    window: int | None = None,
) -> None:
    """Store slots in pages, to the bit. Where no expiries are given they are position + `window`, None: never.

    Raises ValueError for what does not fit.
    """
    _check(pages, table, slot, first, count)
    total = 0 if stored[4] is None else len(stored[4])
    for part, given in zip(pages, stored, strict=True):
        if (part is None) != (given is None) and part is not pages.expiry:
            raise ValueError("copies: what is stored does not have the parts of these pages")
        if part is not None and given is not None and not (_fits(part, given) and len(given) == total):
            raise ValueError("copies: what is stored is not as these pages store it")
    if bool(((first < 0) | (count < 0) | (first + count > total) | (slot < 0)).any()) or bool(
        (slot + count > table.shape[1] * pages.key.shape[1]).any()
    ):
        raise ValueError("copies: rows reach beyond what is stored, or beyond their pages")
    flat = [0 if t is None else t.data_ptr() for t in stored]
    numbers = first.data_ptr(), slot.data_ptr(), count.data_ptr()
    after = *numbers, 0, 0, 0, 0, 0, -1 if window is None else window, 0, 0, total * _slot_nbytes(pages)
    _kernels.fill(_packed(pages, flat, table, (0, 0), after))


def chosen(
    pages: Pages,
    table: Tensor,  # [R, M] int32
    length: Tensor,  # [R] int32
    expiry: tuple[int, int],
    position: tuple[int, int],
    newest: Tensor | None = None,  # [R] int32
) -> tuple[Tensor, Tensor, Tensor]:
    """(slots, where each row's begin [R], how many [R]), int64: those of rows with an expiry from the first up to the
    second and a position from the first up to, not including, the second, ordered by position.

    A row's `newest` slot is wanted whatever its expiry. Raises ValueError for what does not fit.
    """
    count = length.long()
    _check(pages, table, count)
    _check_length(pages, table, length)
    if newest is not None and (newest.dtype != torch.int32 or newest.shape != length.shape or newest.stride(0) != 1):
        raise ValueError("copies: newest slots must be int32, one for each row")
    first = count.cumsum(0) - count
    order = torch.empty(int(count.sum()), dtype=torch.int64)
    numbers = first.data_ptr(), 0, count.data_ptr(), order.data_ptr()
    after = *numbers, *expiry, position[0], max(position), -1, 0, 0, len(order)
    newest_at = 0 if newest is None else newest.data_ptr()
    _kernels.choose(_packed(pages, NONE, table, (length.data_ptr(), newest_at), after))
    return order, first, count


def taken(pages: Pages, table: Tensor, order: Tensor, slot: Tensor, count: Tensor) -> list[Tensor]:
    """What `octavo.attention.slots` gives of the slots that `chosen` has found, one row after another."""
    _check(pages, table, slot, count)
    if bool(((slot < 0) | (count < 0) | (slot + count > len(order))).any()):
        raise ValueError("copies: rows reach beyond the slots that were found")
    total = int(count.sum())
    out = [None if t is None else torch.empty(total, *t.shape[2:], dtype=t.dtype) for t in pages]
    first = count.cumsum(0) - count
    flat = [0 if t is None else t.data_ptr() for t in out]
    numbers = first.data_ptr(), slot.data_ptr(), count.data_ptr(), order.data_ptr()
    _kernels.take(_packed(pages, flat, table, (0, 0), (*numbers, 0, 0, 0, 0, -1, 0, 0, total * _slot_nbytes(pages))))
    return [t for t in out if t is not None]


def expired(
    pages: Pages,
    table: Tensor,  # [R, M] int32
    length: Tensor,  # [R] int32
    limit: Tensor,  # [R] int32
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(slots int64 [R, K], their expiries int32 [R, K], how many there are int64 [R]): those with an expiry below their
    row's `limit`, in the order of slots, the first `most` of each row; past the last one they mean nothing.

    K is what the fullest row needs, at least 1. Raises ValueError for what does not fit.
    """
    count = length.long()
    _check(pages, table, count)
    _check_length(pages, table, length)
    if limit.dtype != torch.int32 or limit.shape != length.shape or not limit.is_contiguous() or most < 1:
        raise ValueError("copies: limits must be int32, one for each row, and at least one slot of a row is told")
    slot, when = (torch.zeros(len(table), most, dtype=dtype) for dtype in (torch.int64, torch.int32))
    flat = *NONE[:-1], when.data_ptr()
    after = 0, 0, count.data_ptr(), slot.data_ptr(), 0, 0, 0, 0, -1, limit.data_ptr(), most, int(length.sum())
    _kernels.expired(_packed(pages, flat, table, (length.data_ptr(), 0), after))
    needed = max(1, min(most, int(count.max()) if len(count) else 0))
    return slot[:, :needed], when[:, :needed], count


def clear(pages: Pages, ids: Tensor) -> None:
    """Make pages (int64 [n]) zero, all of each. Raises ValueError for pages that there are not."""
    if ids.dtype != torch.int64 or not ids.is_contiguous() or not ids.is_cpu:
        raise ValueError("copies: pages must be int64 on the CPU")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(pages.key):
        raise ValueError("copies: there are no such pages")
    step = pages.key.stride(0) * pages.key.element_size()
    after = 0, 0, 0, ids.data_ptr(), 0, 0, 0, 0, -1, 0, 0, len(ids) * step
    _kernels.clear(_packed(pages, NONE, ids[:, None].int(), (0, 0), after))


def _check_length(pages: Pages, table: Tensor, length: Tensor) -> None:
    """Raise ValueError unless these are numbers of slots that rows have in their pages."""
    if length.dtype != torch.int32 or not length.is_contiguous() or bool((length < 0).any()):
        raise ValueError("copies: lengths must be int32 of at least 0")
    if bool((length > table.shape[1] * pages.key.shape[1]).any()):
        raise ValueError("copies: rows reach beyond their pages")


def _packed(pages: Pages, flat: Sequence[int], table: Tensor, lengths: tuple[int, int], after: Sequence[int]) -> bytes:
    """The request; addresses must outlive the call."""
    sizes = [0 if t is None else t.element_size() * (t.shape[2] if t.ndim == 3 else 1) for t in pages]
    at = [0 if t is None else t.data_ptr() for t in pages]
    key = pages.key
    layout = key.shape[1], key.stride(0) * key.element_size()
    rows = table.data_ptr(), table.stride(0), len(table)
    threads = min(torch.get_num_threads(), _CORES)
    return _REQUEST.pack(*at, *flat, *sizes, *layout, *rows, *lengths, *after, threads)


def _slot_nbytes(pages: Pages) -> int:
    return sum(t.element_size() * (t.shape[2] if t.ndim == 3 else 1) for t in pages if t is not None)


def _fits(part: Tensor, given: Tensor) -> bool:
    return given.dtype == part.dtype and given.shape[1:] == part.shape[2:] and given.is_cpu and given.is_contiguous()


def _check(pages: Pages, table: Tensor, *rows: Tensor) -> None:
    """Raise ValueError unless tables and numbers of rows lie as C reads them; page ids are trusted."""
    if table.dtype != torch.int32 or table.ndim != 2 or not table.is_cpu or table.stride(1) != 1:
        raise ValueError("copies: a table must be int32 [rows, columns] on the CPU")
    for each in rows:
        if each.dtype != torch.int64 or each.shape != table.shape[:1] or not each.is_cpu or not each.is_contiguous():
            raise ValueError("copies: numbers of rows must be int64, one for each row")
    step = pages.key.stride(0) * pages.key.element_size()
    for part in pages:
        if part is not None and (part.stride(0) * part.element_size() != step or not part.is_cpu):
            raise ValueError("copies: pages must be on the CPU, laid out as PageLayout does")
