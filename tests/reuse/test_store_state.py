"""The store against a dictionary: what it gives is always right, never another tenant's, never what was deleted or has
expired, and always there unless a budget, or a server's own policy, made it leave."""

import importlib.util
import math
import random
import tempfile
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.config import Eviction
from octavo.kv.capture import capture, kept_and_tail, snapshot_of, trimmed
from octavo.kv.ragged import between
from octavo.reuse import ReuseStore, remote
from octavo.reuse.record import OVERHEAD
from reuse.plain import Model, read

EVICTIONS = (None, Eviction(7), Eviction(7, 1), Eviction(25), Eviction(25, 1))
SHORTEST, BACK = 4, 10
STEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]

stems = st.integers(0, len(STEM))
ends = st.lists(st.integers(0, 2), min_size=1, max_size=30)
TIERS = ["memory", "disk", "both"]
if importlib.util.find_spec("fakeredis"):
    from reuse.served import Fake, values

    TIERS += ["server", "memory and server", "all"]
tenants = st.sampled_from(["", "a"])


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Stored:
    """One prompt that was stored."""

    def __init__(self, tenant, tokens, tag, expires):
        self.tenant, self.tokens, self.tag, self.expires = tenant, tokens, tag, expires
        self.pinned = False


class Machine(RuleBasedStateMachine):
    budgets: tuple = (None, None)

    @initialize(eviction=st.sampled_from(EVICTIONS), tiers=st.sampled_from(TIERS),
                tight=st.booleans(), policy=st.sampled_from(["lru", "slru"]))  # fmt: skip
    def begin(self, eviction, tiers, tight, policy):
        self.folder = tempfile.TemporaryDirectory()
        self.model, self.now = Model(eviction), 1000.0
        self.limits = {
            "memory": None if tiers in ("disk", "server") else 60_000 if tight else 10**8,
            "disk": Path(self.folder.name) if tiers in ("disk", "both", "all") else None,
            "disk_budget": 30_000 if tight else 10**8,
        }
        self.server = Fake() if tiers in ("server", "memory and server", "all") else None
        self.evicted = False  # whether the server has evicted anything
        self.plugged, self.failed = True, False  # whether the server is there, and was ever away
        self.policy, self.tight = policy, tight
        self.live: list[Stored] = []
        self.complete = True  # nothing had to leave yet, and nothing lives for some time only
        self.open_store()
        if self.server is not None:  # another machine, which has nothing but the server
            self.other = self.opened(memory=None)

    def open_store(self):
        self.store = self.opened(**self.limits, quotas={"a": 40_000} if self.tight else None)

    def opened(self, **options):
        server = None if self.server is None else self.server.client()
        return ReuseStore(
            **options, policy=self.policy, shortest=SHORTEST, back=BACK, clock=lambda: self.now, remote=server
        )

    def alive(self, tenant):
        return [s for s in self.live if s.tenant == tenant and s.expires > self.now]

    @rule(stem=stems, end=ends, tenant=tenants, tag=st.sampled_from(["x", "y"]), answer=st.integers(0, 12),
          ttl=st.sampled_from([None, None, None, 50]))  # fmt: skip
    def ask(self, stem, end, tenant, tag, answer, ttl):
        self.asked(self.store, stem, end, tenant, tag, answer, ttl)

    @precondition(lambda self: self.server is not None)
    @rule(stem=stems, end=ends, tenant=tenants, answer=st.integers(0, 12))
    def ask_elsewhere(self, stem, end, tenant, answer):
        if self.tight:
            self.complete = False  # the bookkeeping of what others have stored may have no room
        self.asked(self.other, stem, end, tenant, "z", answer, None)

    def asked(self, store, stem, end, tenant, tag, answer, ttl):
        tokens = STEM[:stem] + end
        n = max(1, len(tokens) - answer)
        alive = self.alive(tenant)
        most = max((common(tokens[: n - 1], s.tokens) for s in alive), default=0)
        known = [s for s in alive if s.tokens == tokens[: len(s.tokens)] and SHORTEST <= len(s.tokens) < n]
        if not self.complete:
            known = [s for s in known if s.pinned and (store is self.store or not (self.failed or self.evicted))]
        before = store.stats()
        with store.request(tenant=tenant, tags=[tag], ttl=ttl):
            got = self.model.ask(store, tokens, n)
        assert got <= most, "no more than what is stored"
        assert got >= max((len(s.tokens) for s in known), default=0), "all that is stored"
        store.flush()
        after = store.stats()
        if after.evicted > before.evicted or after.refused > before.refused or ttl is not None:
            self.complete = False
        for p in {n, len(tokens)}:
            if p >= SHORTEST:
                self.live.append(Stored(tenant, tokens[:p], tag, math.inf if ttl is None else self.now + ttl))

    @rule(seconds=st.sampled_from([1, 40]))
    def wait(self, seconds):
        self.now += seconds

    @rule(which=st.integers(0, 20), ttl=st.sampled_from([None, 30]))
    def pin(self, which, ttl):
        if self.live:
            chosen = self.live[which % len(self.live)]
            far = [r for r in self.store.index.records.values() if r.extent is None and r.path is None]
            # What a server has evicted without a word is pinned all the same, and missed when it is read.
            gone = self.evicted and any(common(r.entry.tokens, chosen.tokens) > r.entry.first for r in far)
            with self.store.request(tenant=chosen.tenant):
                held = self.store.pin(chosen.tokens, ttl)
            assert held <= len(chosen.tokens)
            if ttl is None and held == len(chosen.tokens) and chosen.expires > self.now:
                chosen.pinned, chosen.expires = not gone, math.inf

    @precondition(lambda self: self.server is not None and self.plugged)
    @rule(seed=st.integers(0, 1000))
    def evict(self, seed):
        self.complete, self.evicted = False, True
        client, dice = self.server.client(), random.Random(seed)
        for name in sorted(client.keys("octavo:*")):
            if dice.random() < 0.3:
                client.delete(name)
        for s in self.live:
            s.pinned = False

    @precondition(lambda self: self.server is not None and self.plugged)
    @rule()
    def unplug(self):
        self.complete, self.failed, self.plugged = False, True, False
        self.server.server.connected = False
        self.store.stats()
        for s in self.live:
            s.pinned = False

    @precondition(lambda self: not self.plugged)
    @rule()
    def plug(self):
        self.plugged = self.server.server.connected = True
        self.store.list()
        self.store.flush()  # what was deleted meanwhile goes before others look

    @rule(stem=stems, tenant=tenants)
    def delete_prefix(self, stem, tenant):
        self.store.delete(prefix=STEM[:stem], tenant=tenant)
        gone = [s for s in self.live if s.tenant == tenant and s.tokens[:stem] == STEM[:stem]]
        self.forget(gone)

    @rule(tag=st.sampled_from(["x", "y"]))
    def delete_tag(self, tag):
        self.complete = False  # a tag is that of who stored something first
        self.store.delete(tag=tag)
        for s in self.live:
            s.pinned = False

    @rule(tenant=tenants)
    def delete_tenant(self, tenant):
        self.store.delete(tenant=tenant)
        self.forget([s for s in self.live if s.tenant == tenant])

    @rule()
    def clear(self):
        self.store.clear()
        self.live.clear()
        stats = self.store.stats()
        assert stats.memory_records == stats.disk_records == stats.remote_records == 0
        assert self.server is None or not self.plugged or not values(self.server.client())
        assert self.store.index.index_nbytes == 0
        assert not self.store.index.trees

    @precondition(lambda self: self.plugged)
    @rule()
    def restart(self):
        if self.limits["disk"] is None and self.server is None:
            return
        self.store.close()
        assert self.store.verify() == ()
        if self.tight or self.failed:
            self.complete = False
            for s in self.live:
                s.pinned = False  # what was pinned in memory alone may be gone
        self.open_store()

    def forget(self, gone):
        self.live = [s for s in self.live if s not in gone]

    @invariant()
    def within_budgets(self):
        self.store.stats()
        self.store.flush()  # what has expired just now may have been cut, and is written behind
        index, stats = self.store.index, self.store.stats()
        if self.limits["memory"] is not None:
            assert stats.memory_nbytes <= self.limits["memory"]
            assert index.memory.nbytes == sum(r.nbytes for r in index.records.values() if r.extent is not None)
        if self.limits["disk"] is not None:
            files = list(Path(self.folder.name).glob("*.kv"))
            assert stats.disk_nbytes <= sum(f.stat().st_size for f in files) <= self.limits["disk_budget"]
            known, there = {r.key for r in index.disk.records}, {f.stem for f in files}
            # After a restart half of the memory takes in so many files; more of them stay for other processes.
            most = self.limits["memory"] if self.tight else None
            full = most is not None and (len(known) + 1) * OVERHEAD > most / 2
            assert known <= there if full else known == there
            assert full or sum(f.stat().st_size for f in files) == stats.disk_nbytes
        if self.server is not None and self.plugged:
            there = {name.decode()[-32:] for name in values(self.server.client())}
            known = {r.key for r in index.remote.records}
            assert self.evicted or known <= there
            assert self.evicted or self.tight or known == there
            assert index.remote.nbytes == sum(r.remote_nbytes for r in index.records.values())
            assert stats.damaged == 0
            assert self.failed or stats.errors == 0
        if self.tight:
            assert all(shelf.by_tenant["a"] <= 40_000 for shelf in index.shelves if shelf is not index.remote)
        assert all(r.users == 0 for r in index.records.values())
        assert all(p.key in index.records for r in index.records.values() for p in r.parents)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


def test_the_store_is_a_dictionary_of_prefixes_within_budgets(full, monkeypatch):
    monkeypatch.setattr(remote, "LOOK", 0.0)
    monkeypatch.setattr(remote, "SHARE", 0)
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    warnings.filterwarnings("ignore", "the reuse cache cannot use the server")
    torch.set_num_threads(1)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            derandomize=not full,  # the same histories each time; --full looks for new ones
            max_examples=200 if full else 20,
            stateful_step_count=40 if full else 25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_slots_read_at_once_are_those_read_one_after_the_other():
    dice = random.Random(0)
    for eviction in EVICTIONS * 3:
        cache, tokens = Model(eviction).cache(), [dice.randrange(50) for _ in range(dice.randrange(3, 90))]
        read(cache, tokens, len(tokens))
        tables, (row,), shift = cache.tables, cache.rows, cache.sequences.shift
        first = dice.randrange(len(tokens) - shift)
        found = kept_and_tail(tables, row, first, shift)
        expected = (
            snapshot_of(tables, row, [], [len(tokens)], shift, {}).segments[0],
            trimmed(tables.pool.pages, capture(tables, slice(row, row + 1), shift)[0]),
        )
        for part, reference in zip(found, (between(expected[0], first, len(tokens)), expected[1]), strict=True):
            assert all(torch.equal(t, reference.tensors[name]) for name, t in part.tensors.items())
