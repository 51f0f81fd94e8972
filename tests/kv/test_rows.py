"""The rows against a plain Python model of what each one must hold, over random writes, crops and selections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import NEVER
from octavo.errors import CacheBudgetError, CacheStateError
from octavo.kv.pool import PagePool
from octavo.kv.rows import Rows

D = 2


def new_rows(batch: int, page_size: int, budget: int | None = None, layers: int = 2, heads: int = 2) -> Rows:
    return Rows(PagePool(D, torch.float32, torch.device("cpu"), page_size, budget), layers, batch, heads)


class Oracle:
    """Every token ever written, row by row, with its key."""

    def __init__(self, layers: int, batch: int, heads: int) -> None:
        self.tokens = {(i, b, h): [] for i in range(layers) for b in range(batch) for h in range(heads)}
        self.position = [0] * batch

    def visible(self, row: tuple[int, int, int]) -> set[tuple[int, float]]:
        now = self.position[row[1]]
        return {(p, k) for p, e, k in self.tokens[row] if e >= now}


def write(rows: Rows, oracle: Oracle, n: int, window: int, rate: float, pads: list[int], g: torch.Generator) -> None:
    layers, batch, heads = rows.length.shape
    before = torch.tensor(oracle.position)
    pad = torch.tensor([min(p, n) for p in pads])
    columns = torch.arange(n)
    real = columns >= pad[:, None]
    position = torch.where(real, before[:, None] + columns - pad[:, None], -1).int()
    marked = torch.rand(layers, batch, heads, n, generator=g) < rate
    expiry = torch.where(marked, position[None, :, None] + window, NEVER).int()
    key = torch.randn(layers, batch, heads, n, D, generator=g)
    now = before + real.sum(1)
    rows.write(key, key + 1, position, expiry, now, True, bool(pad.any()))
    for (i, b, h), kept in oracle.tokens.items():
        for j in range(n):
            if real[b, j]:
                kept.append((int(position[b, j]), int(expiry[i, b, h, j]), key[i, b, h, j, 0].item()))
    oracle.position = now.tolist()


def check(rows: Rows, oracle: Oracle) -> None:
    S = rows.pool.page_size
    now = torch.tensor(oracle.position)
    live = rows.live(now)
    pages = []
    for (i, b, h), _ in oracle.tokens.items():
        used = int(rows.length[i, b, h])
        ids = rows.table[i, b, h, : -(-used // S)].long()
        pages += ids.tolist()
        position = rows.pool.position[ids].flatten()[:used]
        expiry = rows.pool.expiry[ids].flatten()[:used]
        key, value = (t[ids].flatten(0, 1)[:used, 0] for t in (rows.pool.k, rows.pool.v))
        seen = expiry >= now[b]
        held = set(zip(position[seen].tolist(), key[seen].tolist(), strict=True))
        assert held == oracle.visible((i, b, h))
        assert len(held) == int(live[i, b, h]) == int(seen.sum())
        torch.testing.assert_close(value[seen], key[seen] + 1)
    free = rows.pool.free[: int(rows.pool.free_count)].tolist()
    assert sorted(pages + free) == list(range(rows.pool.pages)), "every page is in one row or free"


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), page_size=st.integers(1, 5), window=st.integers(1, 12), rate=st.sampled_from([0.0, 0.5, 0.9, 1.0])
)
def test_rows_hold_what_is_visible(data: st.DataObject, page_size: int, window: int, rate: float) -> None:
    batch = data.draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    rows, oracle = new_rows(batch, page_size), Oracle(2, batch, 2)
    for _ in range(data.draw(st.integers(1, 8))):
        n = data.draw(st.sampled_from([1, 1, 2, 5, 30]))
        pads = data.draw(st.lists(st.sampled_from([0, 0, 3]), min_size=batch, max_size=batch))
        write(rows, oracle, n, window, rate, pads, g)
        check(rows, oracle)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_expired_slots_are_reused_in_place(rate: float) -> None:
    """Rows never grow past what is visible: the write that frees a slot also fills it."""
    rows, oracle, g = new_rows(1, 4), Oracle(2, 1, 2), torch.Generator().manual_seed(0)
    for n in (40, 7, *[1] * 60):
        write(rows, oracle, n, 10, rate, [0], g)
        assert torch.equal(rows.length.long(), rows.live(torch.tensor(oracle.position)))


def test_crop_forgets_exactly_the_newest_tokens() -> None:
    rows, oracle, g = new_rows(2, 3), Oracle(2, 2, 2), torch.Generator().manual_seed(0)
    write(rows, oracle, 25, 1000, 0.5, [0, 3], g)
    before = rows.pool.nbytes
    now = torch.tensor([12, 9])
    rows.crop(now)
    assert rows.pool.nbytes < before, "pages are given back"
    for row, kept in oracle.tokens.items():
        oracle.tokens[row] = [t for t in kept if t[0] < now[row[1]]]
    oracle.position = now.tolist()
    check(rows, oracle)
    write(rows, oracle, 5, 1000, 0.5, [0, 0], g)
    check(rows, oracle)


def test_crop_past_an_eviction_is_refused_and_changes_nothing() -> None:
    rows, oracle, g = new_rows(1, 3), Oracle(2, 1, 2), torch.Generator().manual_seed(0)
    write(rows, oracle, 30, 4, 1.0, [0], g)
    with pytest.raises(CacheStateError, match="already evicted"):
        rows.crop(torch.tensor([20]))
    check(rows, oracle)


def test_select_copies_and_reorders() -> None:
    rows, oracle, g = new_rows(3, 3), Oracle(2, 3, 2), torch.Generator().manual_seed(0)
    write(rows, oracle, 20, 6, 0.5, [0, 4, 2], g)
    order = [2, 0, 2]
    rows.select(torch.tensor(order))
    picked = Oracle(2, 3, 2)
    for i, b, h in picked.tokens:
        picked.tokens[i, b, h] = list(oracle.tokens[i, order[b], h])
    picked.position = [oracle.position[b] for b in order]
    check(rows, picked)
    write(rows, picked, 9, 6, 0.5, [0, 0, 0], g)  # the copies do not share pages
    check(rows, picked)


def test_budget_is_kept_and_nothing_is_lost() -> None:
    pool = PagePool(D, torch.float32, torch.device("cpu"), 4, None)
    rows = new_rows(1, 4, budget=20 * pool.page_nbytes)
    oracle, g = Oracle(2, 1, 2), torch.Generator().manual_seed(0)
    write(rows, oracle, 16, 6, 0.0, [0], g)
    length, table = rows.length.clone(), rows.table.clone()
    with pytest.raises(CacheBudgetError, match="budget is"):
        write(rows, Oracle(2, 1, 2), 30, 6, 0.0, [0], g)
    assert torch.equal(rows.length, length)
    assert torch.equal(rows.table[..., : table.shape[3]], table)
    check(rows, oracle)
    write(rows, oracle, 4, 6, 0.0, [0], g)
    check(rows, oracle)
    assert rows.pool.nbytes <= 20 * pool.page_nbytes


def test_nbytes_counts_every_tensor() -> None:
    rows, g = new_rows(2, 4), torch.Generator().manual_seed(0)
    write(rows, Oracle(2, 2, 2), 33, 6, 0.5, [0, 0], g)
    pool = rows.pool
    tensors = [pool.k, pool.v, pool.position, pool.expiry, pool.free, rows.table, rows.length, rows.lost]
    assert rows.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
