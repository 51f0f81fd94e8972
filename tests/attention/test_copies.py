"""Copies between pages and flat memory in C against torch's indexing, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.attention import PageLayout, put, slots
from octavo.attention.cpu import copies
from octavo.config import NEVER

pytestmark = pytest.mark.skipif(not copies.BUILT, reason="built without a C compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
shapes = st.tuples(
    st.lists(st.integers(0, 21), min_size=1, max_size=5),  # slots of each row
    st.integers(1, 7),  # of a page
    st.sampled_from([1, 3, 8]),  # head dimension
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)


def as_bytes(t):
    return t.contiguous().flatten().view(torch.uint8)


def same(found, expected):
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(found, expected, strict=True))


def pages_of(lengths, page_size, head_dim, dtype, seed):
    """(pages of random bits, each with a table row [R, M] of its own, a generator)."""
    rng = torch.Generator().manual_seed(seed)
    columns = max(1, -(-max(lengths) // page_size)) + 1
    layout = PageLayout(page_size, head_dim, dtype)
    raw = torch.randint(0, 256, ((len(lengths) * columns + 3) * layout.nbytes,), dtype=torch.uint8, generator=rng)
    pages = layout.views(raw)
    table = torch.randperm(len(pages.key), generator=rng)[: len(lengths) * columns].view(len(lengths), columns).int()
    return pages, table, rng


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([None, 0, 9]))
def test_filling_is_putting(shape, window):
    pages, table, rng = pages_of(*shape)
    other = PageLayout(shape[1], shape[2], shape[3]).views(
        torch.empty(0, dtype=torch.uint8).set_(pages.key.untyped_storage()).clone()
    )
    lengths = torch.tensor(shape[0])
    slot = torch.randint(0, shape[1] + 1, (len(lengths),), generator=rng)  # the tables have a page to spare
    before = torch.randint(0, 4, (len(lengths),), generator=rng)  # what lies between the rows is not for these
    first = (lengths + before).cumsum(0) - lengths
    total = int((lengths + before).sum())
    stored = [
        None
        if part is None
        else torch.randint(0, 256, (total, *part.shape[2:], part.element_size()), dtype=torch.uint8, generator=rng)
        .view(part.dtype)
        .squeeze(-1)
        for part in pages
    ]
    stored[4] = torch.arange(total, dtype=torch.int32)
    head = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(head)) - (lengths.cumsum(0) - lengths)[head]
    index, at = first[head] + place, (slot[head] + place)
    expected = [None if t is None else as_rows(t)[index] for t in stored]
    if window != 9:
        stored[5] = None
        expected[5] = stored[4][index] + window if window == 0 else torch.full((len(index),), NEVER, dtype=torch.int32)
    put(other, table[head, at // shape[1]].long(), at % shape[1], [t for t in expected if t is not None])
    copies.fill(pages, table, slot, stored, first, lengths, 0 if window == 0 else None)
    assert same([t for t in pages if t is not None], [t for t in other if t is not None])


def as_rows(t):
    return t.view(torch.uint8) if t.dtype in (torch.int8, torch.float8_e4m3fn) else t


@settings(max_examples=60, deadline=None)
@given(shapes, st.booleans(), st.integers(0, 40), st.integers(0, 40))
def test_what_is_chosen_is_what_a_search_finds_in_order(shape, newest, a, b):
    pages, table, rng = pages_of(*shape)
    low, high = min(a, b), max(a, b)
    found, length = [], torch.tensor(shape[0], dtype=torch.int32)
    newest_slot = torch.randint(-1, 22, (len(length),), generator=rng).int().clamp(max=length - 1) if newest else None
    for row, n in enumerate(shape[0]):
        positions = torch.randperm(40, generator=rng)[:n].int()
        expiries = torch.randint(0, 50, (n,), generator=rng).int()
        page, inside = table[row, torch.arange(n) // shape[1]].long(), torch.arange(n) % shape[1]
        pages.position[page, inside], pages.expiry[page, inside] = positions, expiries
        last = -1 if newest_slot is None else int(newest_slot[row])
        wanted = [i for i in range(n) if (10 <= expiries[i] <= 35 or i == last) and low <= positions[i] < high]
        found.append(sorted(wanted, key=lambda i: positions[i]))
    order, first, count = copies.chosen(pages, table, length, (10, 35), (low, high), newest_slot)
    assert [order[f : f + n].tolist() for f, n in zip(first, count, strict=True)] == found
    head = torch.arange(len(found)).repeat_interleave(count)
    slot = torch.tensor([i for each in found for i in each], dtype=torch.int64)
    expected = slots(pages, table[head, slot // shape[1]].long(), slot % shape[1])
    assert same(copies.taken(pages, table, order, first, count), expected)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(0, 4))
def test_cleared_pages_are_zero_and_no_others(shape, some):
    pages, table, _ = pages_of(*shape)
    before, ids = [None if t is None else t.clone() for t in pages], table.flatten()[:some].long()
    copies.clear(pages, ids)
    for part, was in zip(pages, before, strict=True):
        if was is not None:
            as_rows(was)[ids] = 0
            assert torch.equal(as_bytes(part), as_bytes(was))


def test_what_does_not_fit_is_refused():
    pages, table, _ = pages_of([5, 3], 4, 2, torch.float32, 0)
    stored = [torch.zeros(8, 2), torch.zeros(8, 2), None, None, torch.zeros(8, dtype=torch.int32), None]
    zero, first, count = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 5]), torch.tensor([5, 3])
    copies.fill(pages, table, zero, stored, first, count)
    for given_, message in (
        ((table, zero, stored, first, count + 9), "reach beyond"),
        ((table, zero + 99, stored, first, count), "reach beyond"),
        ((table, zero, [torch.zeros(8, 3), *stored[1:]], first, count), "as these pages store it"),
        ((table, zero, [torch.zeros(2, 2), *stored[1:]], first, count), "as these pages store it"),
        ((table, zero, [None, *stored[1:]], first, count), "the parts"),
        ((table.long(), zero, stored, first, count), "int32"),
        ((table, zero.int(), stored, first, count), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            copies.fill(pages, *given_)
    with pytest.raises(ValueError, match="beyond their pages"):
        copies.chosen(pages, table, torch.tensor([99, 1], dtype=torch.int32), (0, 1), (0, 1))
    with pytest.raises(ValueError, match="reach beyond"):
        copies.taken(pages, table, zero[:1], first, count)
    with pytest.raises(ValueError, match="no such pages"):
        copies.clear(pages, torch.tensor([len(pages.key)]))
