"""What is kept at a boundary that a chunk goes past is what a forward that ends there leaves, to the bit."""

import copy
import random

import pytest
import torch

from octavo import KVCache, attach
from octavo.attention.cpu import copies
from octavo.config import Eviction
from octavo.kv import PagedCache, Sequences
from reuse.plain import SHAPE, Model, held, read, wanted
from tiny import tiny_adapter, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
EVICTIONS = [Eviction(5, 0), Eviction(9, 1), Eviction(40, 0), Eviction(30, 1)]


@pytest.fixture(params=[True, False], ids=["C", "torch"])
def in_c(request, monkeypatch):
    """Slots are copied in C, or as on a GPU by PyTorch."""
    if request.param and not copies.BUILT:
        pytest.skip("built without a C compiler")
    monkeypatch.setattr(copies, "BUILT", request.param)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_tails_within_chunks_are_those_of_the_rule(eviction):
    dice = random.Random(str(eviction))
    for _ in range(6):
        prompt = [dice.randrange(50) for _ in range(dice.randrange(3, 90))]
        cache = Model(eviction).cache()
        boundaries = sorted(dice.sample(range(1, len(prompt) + 1), min(len(prompt), 5)))
        cache.keep(boundaries)
        read(cache, prompt, len(prompt), passes=True)
        snapshot = cache.snapshot_under({}, boundaries, 0, None)
        for p in boundaries:
            other = Model(eviction).cache()
            other.sequences.restore(snapshot.layout, snapshot.at(p), p)
            assert held(other) == wanted(prompt, p, eviction)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_reads_on_past_its_boundaries(shift, monkeypatch):
    model = tiny_model()
    attach(model, tiny_adapter(model, window=30, shift=shift), chunk=64)
    ids, columns, begin = tokens(2, 150), [], Sequences.begin
    monkeypatch.setattr(Sequences, "begin", lambda self, b, n, *rest: columns.append(n) or begin(self, b, n, *rest))
    caches = [KVCache(model), KVCache(model)]
    for cache in caches:
        cache.keep([50, 64, 100, 149])
        with torch.no_grad():
            model(ids, past_key_values=cache)
        monkeypatch.setattr(Sequences, "passes_boundaries", lambda self, valid: False)
    assert columns == [64, 64, 22, 50, 14, 36, 28, 21, 1]
    for row in range(2):
        passed, ended = (cache.snapshot(sequence=row) for cache in caches)
        assert passed.boundaries == ended.boundaries == (50, 64, 100, 149, 150)
        for a, b in zip(passed.segments + passed.tails, ended.segments + ended.tails, strict=True):
            assert torch.equal(a.counts, b.counts)
            assert torch.equal(a.position, b.position)
            torch.testing.assert_close(a.key, b.key, atol=1e-5, rtol=1e-5)
            assert (a.expiry is None and b.expiry is None) or torch.equal(a.expiry, b.expiry)


@pytest.mark.skipif(not copies.BUILT, reason="built without a C compiler")
@pytest.mark.parametrize("eviction", [None, *EVICTIONS], ids=str)
def test_a_restored_row_is_the_same_without_the_copies_in_c(eviction, monkeypatch):
    prompt, rows = [3 * i % 50 for i in range(70)], []
    cache = Model(eviction).cache()
    read(cache, prompt, 70)
    snapshot = cache.snapshot_under({}, None, 0, None)
    for built in (True, False):
        monkeypatch.setattr(copies, "BUILT", built)
        other = Model(eviction).cache()
        other.sequences.restore(snapshot.layout, snapshot.at(70), 70)
        tables = other.tables
        marks = tables.marks[other.rows[0]].clone()
        rows.append((held(other), marks.tolist(), tables.newest[other.rows[0]].tolist()))
        tables.find_marks(other.sequences.index, other.position)
        assert torch.equal(tables.marks[other.rows[0]][..., :-1], marks[..., :-1])
    assert rows[0] == rows[1]
    assert rows[0][0] == wanted(prompt, 70, eviction)


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_boundaries_hold_where_tokens_are_taken_back_and_others_read(eviction, full):
    """Chunks past boundaries, crops within `undo`, copies that share pages, and restored rows, in any order."""
    for seed in range(40 if full else 5):
        dice, model = random.Random(f"{seed} {eviction}"), Model(eviction)

        def new(undo, model=model):
            return PagedCache(SHAPE, model.eviction, model.memory, undo=undo)

        live = [(new(dice.choice([4, 20])), [])]
        for _ in range(12):
            cache, tokens = dice.choice(live)
            cache.keep({len(tokens) + dice.randrange(1, 40) for _ in range(2)})
            more = dice.choice([1, 3, 5, 20, 45])
            tokens += [dice.randrange(4) for _ in range(more)]
            read(cache, tokens, len(tokens), passes=dice.random() < 0.7)
            back = dice.randrange(min(more, cache.sequences.undo) + 1)
            cache.crop(-back)
            del tokens[len(tokens) - back :]
            if not tokens:
                continue
            assert held(cache) == wanted(tokens, len(tokens), eviction)
            snapshot = cache.snapshot_under({}, None, 0, None)
            p = dice.choice(snapshot.boundaries)
            other = new(dice.choice([0, 4, 20]))
            other.sequences.restore(snapshot.layout, snapshot.at(p), p)
            assert held(other) == wanted(tokens, p, eviction)
            live += [(other, tokens[:p]), (copy.deepcopy(cache), list(tokens))][: 4 - len(live)]
        del cache, other, live
        model.memory.reclaim()
        assert model.memory.sequences == 0
