"""What caches of one memory may take from each other: nothing. Budgets, pages promised to CUDA graphs, threads."""

import copy
import sys
import threading

import pytest
import torch
from test_steps import SHAPE, D, H, L, Sequences, check, forward, new_memory

from octavo import KVCache, attach
from octavo.config import Eviction
from octavo.errors import CacheBudgetError, CacheStateError, ConfigError
from octavo.kv import PagedCache
from tiny import tiny_adapter, tiny_model, tokens


@torch.no_grad()
def read(model, ids, cache):
    return model(ids, past_key_values=cache).logits


def step(cache, batch=1, columns=1):
    new = torch.zeros(batch, H, columns, D)
    running = cache.begin(batch, columns, None)
    for layer in range(L):
        cache.update(new, new, layer)
        running.update(layer, new, new)
    cache.commit(torch.zeros(L, batch, H, columns, dtype=torch.bool))


def test_a_step_loses_nothing_while_another_thread_adds_rows():
    cache = PagedCache(SHAPE, Eviction(5), new_memory())
    step(cache)

    def add():
        for _ in range(200):
            cache.tables.join(20)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=add)
        thread.start()
        while thread.is_alive() and cache.seen < 300:
            step(cache)
            assert int(cache.position) == cache.seen
    finally:
        sys.setswitchinterval(switch)
        thread.join()


def test_pages_promised_to_a_graph_go_to_nobody_else():
    memory = new_memory(4)
    one, other = (Sequences(PagedCache(SHAPE, None, memory), 2) for _ in range(2))
    forward(one, 5, [0, 0], 2)
    forward(other, 5, [0, 0], 2)
    one.cache.tables.widen(200)  # else the other's growing would end the promise
    one.cache.reserve(40)
    pool = memory.pool
    promised = L * 2 * H * 10
    assert pool.demand.promised == promised
    forward(other, 60, [0, 0], 4)
    memory.trim(0)
    assert int(pool.free_count) >= promised
    one.cache.replayed(8)
    assert pool.demand.promised == L * 2 * H * 8
    one.cache.reset()
    assert pool.demand.promised == 0


def test_replays_are_refused_when_rows_have_joined_since():
    memory = new_memory(4)
    one = Sequences(PagedCache(SHAPE, None, memory), 2)
    forward(one, 5, [0, 0], 2)
    one.cache.reserve(40)
    forward(Sequences(PagedCache(SHAPE, None, memory), 3), 5, [0, 0, 0], 2)
    with pytest.raises(CacheStateError, match="capture it again"):
        one.cache.replayed(3)
    forward(one, 1, [0, 0], 2)
    assert one.cache.seen == 6


@pytest.mark.parametrize("budget", [0, -5, 1.5, "x", True])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(ConfigError, match="budget"):
        PagedCache(SHAPE, None, new_memory(), budget)


def test_a_cache_never_holds_more_than_its_own_budget():
    model = attach(tiny_model())
    for budget in range(60_000, 140_000, 20_002):
        cache = KVCache(model, budget=budget)
        try:
            read(model, tokens(1, 40), cache)
            cache.batch_repeat_interleave(4)
            for i in range(40):
                read(model, tokens(4, 20 if i % 2 else 1, seed=i), cache)
                assert cache.nbytes <= budget
        except CacheBudgetError:
            pass
        assert cache.nbytes <= budget
    one, other = KVCache(model, budget=50_000), KVCache(model)
    read(model, tokens(1, 10), one)
    read(model, tokens(4, 200), other)
    with pytest.raises(CacheBudgetError):
        one.join(other)
    assert (len(one.rows), len(other.rows)) == (1, 4)


def test_what_is_kept_for_snapshots_is_counted():
    model = tiny_model()
    attach(model, tiny_adapter(model, window=50))
    caches = [KVCache(model) for _ in range(2)]
    caches[1].keep(range(20, 200, 20))
    for cache in caches:
        read(model, tokens(1, 200), cache)
    kept = caches[1].sequences.boundaries.of(caches[1].rows[0])
    assert len(kept) == 9
    tails = [
        t
        for tail in kept
        for t in (tail.part.tensors.values() if hasattr(tail, "part") else (tail.some, *tail.content))
    ]
    assert caches[1].nbytes - caches[0].nbytes == sum(t.nbytes for t in tails)


def test_a_fork_that_is_gone_costs_no_room():
    def until_refused(forked):
        memory = new_memory(4, 10 * 65536)
        cache = PagedCache(SHAPE, None, memory)
        step(cache, 2, 16)
        if forked:
            copy.deepcopy(cache).reset()
        for _ in range(10**4):
            try:
                step(cache, 2, 40)
            except CacheBudgetError:
                cache.abandon()
                break
        return cache.seen, cache.sequences.state.shared

    assert until_refused(True) == until_refused(False)


def test_a_fork_is_cropped_without_copying_what_goes():
    memory = new_memory(4)
    plain = Sequences(PagedCache(SHAPE, None, memory), 1)
    forward(plain, 40, [0], 2)
    held = memory.pool.held()
    twin = plain.copy(copy.deepcopy(plain.cache))
    twin.cache.crop(-33)
    assert memory.pool.held() == held
    twin.tokens, twin.columns = [twin.tokens[0][:7]], twin.columns[:7]
    forward(twin, 1, [0], 2)
    check(memory, [plain, twin])


def test_memory_goes_back_when_sequences_end(monkeypatch):
    monkeypatch.setattr("octavo.kv.pool.spare_of", lambda device: 0)
    memory = new_memory(4)
    cache = PagedCache(SHAPE, None, memory)
    step(cache, 4, 2000)
    full = memory.nbytes
    cache.reset()
    step(cache)
    assert memory.nbytes < full / 3


def test_a_row_without_tokens_has_no_newest_one():
    memory = new_memory()
    plain = Sequences(PagedCache(SHAPE, Eviction(5, 1), memory), 2)
    forward(plain, 4, [4, 0], 2)
    forward(plain, 1, [0, 0], 2)
    plain.cache.crop(-1)
    assert plain.cache.tables.newest[plain.cache.rows[0]].tolist() == [[-1] * H] * L
    plain.tokens = [[], plain.tokens[1][:4]]
    plain.tokens[1][-1].expiry.fill_(2**31 - 1)
    plain.columns.pop()
    for n in (1, 1, 20, 1):
        forward(plain, n, [0, 0], 2)
        check(memory, [plain])


def test_padding_that_joining_made_goes_when_the_longer_sequence_leaves():
    model = attach(tiny_model())
    long, short = KVCache(model), KVCache(model)
    read(model, tokens(1, 100), long)
    read(model, tokens(1, 11, seed=3), short)
    empty = KVCache(model)
    empty.join(short)
    assert (empty.seen, empty.sequences.real) == (11, None)
    empty.join(long)
    empty.keep([110])
    empty.leave([1])
    assert (empty.seen, empty.sequences.real, empty.position.tolist()) == (11, None, [11])
    assert empty.sequences.boundaries.wanted == {21}
    with pytest.raises(CacheStateError, match="no sequence 5"):
        empty.leave([5])
    with pytest.raises(CacheStateError, match="no sequence 5"):
        empty.batch_select_indices(torch.tensor([5]))
    with pytest.raises(CacheStateError, match="whole numbers"):
        empty.keep([70.5])
