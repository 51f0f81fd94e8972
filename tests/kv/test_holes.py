"""Which slots are free and who takes them, in torch and in C, against loops over rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.attention import PageLayout
from octavo.attention.cpu import copies
from octavo.kv.holes import Holes, holes, holes_in
from octavo.kv.plan import place

rows = st.lists(st.lists(st.integers(-1, 9), max_size=13), min_size=1, max_size=6)  # expiries of each row's slots


def expected(row, limit, most):
    free = [(slot, expiry) for slot, expiry in enumerate(row) if expiry < limit]
    return free[:most], len(free)


def told(found: Holes, i):
    n = min(int(found.total[i]), found.slot.shape[1])
    return list(zip(found.slot[i, :n].tolist(), found.expiry[i, :n].tolist(), strict=True)), int(found.total[i])


@settings(max_examples=80, deadline=None)
@given(rows, st.integers(0, 10), st.integers(1, 15))
def test_free_slots_in_torch_are_those_of_a_loop(each, limit, most):
    width = max(map(len, each)) + 1
    expiry = torch.tensor([[*row, *[-1] * (width - len(row))] for row in each], dtype=torch.int32)
    length = torch.tensor([len(row) for row in each], dtype=torch.int32)
    found = holes(expiry, length, torch.full((len(each), 1), limit, dtype=torch.int32), most)
    assert [told(found, i) for i in range(len(each))] == [expected(row, limit, most) for row in each]


@pytest.mark.skipif(not copies.BUILT, reason="built without a C compiler")
@settings(max_examples=80, deadline=None)
@given(rows, st.lists(st.integers(0, 10), min_size=6, max_size=6), st.integers(1, 15), st.integers(1, 5))
def test_free_slots_in_pages_are_those_of_a_loop(each, limits, most, page_size):
    columns = max(map(len, each)) // page_size + 1
    layout = PageLayout(page_size, 4, torch.float32)
    pages = layout.views(torch.zeros((len(each) * columns + 2) * layout.nbytes, dtype=torch.uint8))
    pages.expiry.fill_(-1)  # what lies past a row's length means nothing
    table = torch.randperm(len(pages.key))[: len(each) * columns].view(len(each), columns).int()
    for i, row in enumerate(each):
        for slot, expiry in enumerate(row):
            pages.expiry[table[i, slot // page_size], slot % page_size] = expiry
    length = torch.tensor([len(row) for row in each], dtype=torch.int32)
    limit = torch.tensor(limits[: len(each)], dtype=torch.int32)
    found = holes_in(pages, table[:, None], length[:, None], limit, most)
    flat = Holes(*(t[:, 0] for t in found))
    assert [told(flat, i) for i in range(len(each))] == [expected(row, limits[i], most) for i, row in enumerate(each)]
    # Rows of one sequence share its limit.
    found = holes_in(pages, table[None], length[None], limit[:1], most)
    flat = Holes(*(t[0] for t in found))
    assert [told(flat, i) for i in range(len(each))] == [expected(row, limits[0], most) for row in each]


@settings(max_examples=80, deadline=None)
@given(rows, st.integers(0, 10), st.lists(st.booleans(), min_size=1, max_size=9))
def test_tokens_take_free_slots_first_and_then_the_end(each, limit, stored):
    width = max(map(len, each)) + 1
    expiry = torch.tensor([[*row, *[-1] * (width - len(row))] for row in each], dtype=torch.int32)
    length = torch.tensor([len(row) for row in each], dtype=torch.int32)
    wanted = torch.tensor(stored).expand(len(each), -1)
    free = holes(expiry, length, torch.full((len(each), 1), limit, dtype=torch.int32), len(stored))
    placed = place(free, length, wanted)
    for i, row in enumerate(each):
        slots = [slot for slot, e in enumerate(row) if e < limit]
        taken = slots[: sum(stored)]
        fresh = range(len(row), len(row) + sum(stored) - len(taken))
        assert placed.slot[i][wanted[i]].tolist() == [*taken, *fresh]
        assert int(placed.length[i]) == len(row) + len(fresh)
        assert int(placed.lost[i]) == max((row[slot] for slot in taken), default=-1)
        assert int(placed.left[i]) == len(slots) - len(taken)


@pytest.mark.skipif(not copies.BUILT, reason="built without a C compiler")
def test_what_does_not_fit_is_refused():
    layout = PageLayout(2, 4, torch.float32)
    pages = layout.views(torch.zeros(3 * layout.nbytes, dtype=torch.uint8))
    table, length, limit = torch.zeros(1, 1).int(), torch.ones(1).int(), torch.ones(1).int()
    for bad in (
        (table, length + 2, limit, 1), (table, length, limit.long(), 1), (table, length, limit, 0),
        (table, length, torch.ones(2).int(), 1), (table, -length, limit, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="copies"):
            copies.expired(pages, *bad)
