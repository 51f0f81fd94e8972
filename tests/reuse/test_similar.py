"""Similar prompts: alignment against brute force, turned keys against the model's, and what must never happen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import LLM, KVCache, ReuseStore, SamplingParams, SimilarSettings, attach
from octavo.attachment.attachment import require_attachment
from octavo.attachment.blend import second_values
from octavo.attachment.reuse import begin, store_in
from octavo.attachment.similar import fill_between, rotated, turn, turns
from octavo.config import Eviction
from octavo.errors import ConfigError
from octavo.kv.restoring import layout_of
from octavo.reuse.align import Run, align
from octavo.reuse.draft import Coverage, put_together
from octavo.reuse.record import Space, token_array
from reuse.plain import Model
from reuse.test_reuse_generate import MODELS
from tiny import tiny_adapter, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
EASY = {"least": 8, "first": 4, "last": 0, "most": 1.0, "audit": 0.0}
GREEDY = {"do_sample": False, "max_new_tokens": 4}


def store_of(**changed):
    return ReuseStore("20MB", shortest=8, similar=SimilarSettings(**{**EASY, **changed}))


def model_of(store, window=None):
    model = tiny_model()
    adapter = None if window is None else tiny_adapter(model, window=window)
    return attach(model, adapter, chunk=16, reuse=store)


def ask(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)


def moved(seed=5):
    """(a prompt, the same text after other instructions of another length, the text)."""
    text = tokens(1, 100, seed=seed)
    return torch.cat([tokens(1, 12, seed=1), text], 1), torch.cat([tokens(1, 17, seed=2), text], 1)


def brute(prompt, sources, least, begin):
    runs, at = [], begin
    while at < len(prompt):
        best = (0, False, 0, 0)
        for s, source in enumerate(sources):
            for j in range(len(source)):
                n = 0
                while at + n < len(prompt) and j + n < len(source) and prompt[at + n] == source[j + n]:
                    n += 1
                if n >= least and (n, j == at) > best[:2]:
                    best = (n, j == at, s, j)
        if best[0]:
            runs.append(Run(at, best[2], best[3], best[0]))
        at += max(1, best[0])
    return runs


ids_of = st.lists(st.integers(0, 2), max_size=40)


@settings(max_examples=60, deadline=None)
@given(ids_of, st.lists(ids_of, max_size=3), st.integers(2, 6), st.integers(0, 5))
def test_alignment_is_what_brute_force_finds(prompt, sources, least, begin):
    arrays = [np.array(each, np.int32) for each in (prompt, *sources)]
    assert align(arrays[0], arrays[1:], least, begin) == brute(prompt, sources, least, begin)


@pytest.mark.parametrize("by", [1, -7, 40])
def test_a_turned_key_is_the_key_at_its_new_position(by):
    model = model_of(None)
    attachment, rotary = require_attachment(model), model.base_model.rotary_emb
    assert turns(attachment)
    key = torch.randn(1, 1, 5, model.config.head_dim)
    at = torch.arange(50, 55)[None]
    before, after = (rotated(attachment)(key, key, *rotary(key, p))[1][0, 0] for p in (at, at + by))
    torch.testing.assert_close(turn(attachment, before, by), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 200, 9], ids=["dense", "wide window", "short window"])
def test_moved_text_is_not_computed_again(window):
    store = store_of()
    model = model_of(store, window)
    first, second = moved()
    ask(model, first)
    before = len(store.list())
    out = ask(model, second)
    stats = store.stats()
    assert stats.similar_hits == 1
    assert stats.similar_tokens >= 80
    assert len(store.list()) == before, "what is approximate is never stored"
    assert out.shape[1] == second.shape[1] + GREEDY["max_new_tokens"]
    assert ask(model, second).equal(out)
    assert store.stats().hits == 0


@pytest.mark.parametrize("kind", ["dense", "gates", "gates, short window", "swiftkv"])
def test_what_did_not_move_is_exact(kind):
    """A prompt out of its own slots, with holes that are computed in between: nothing is approximated then."""
    store = ReuseStore("20MB", shortest=8, every=8, similar=True)
    model = MODELS[kind](reuse=store)
    ids = tokens(1, 121, seed=3)
    ask(model, ids)
    cache, array = KVCache(model), token_array(ids)
    layout = layout_of(cache.tables, 0)
    space = Space(cache.identity()).name
    held = Coverage(store.index.find(space, array, layout)[1], len(array))
    draft = put_together(array, [Run(0, 0, 0, 30), Run(50, 0, 50, 40), Run(93, 0, 93, 20)], [held], layout.window, 0)
    assert 30 <= len(draft.computed) <= 60
    fill_between(require_attachment(model), cache, array, store.similar.take(draft), draft.computed)
    full = KVCache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=full)
        assert cache.kept.equal(full.kept)
        for token in (ids[:, -1:], tokens(1, 1, seed=8), tokens(1, 25, seed=9), tokens(1, 1, seed=7)):
            a, b = (model(token, past_key_values=c).logits for c in (cache, full))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert cache.kept.equal(full.kept)


def test_an_audit_above_the_limit_turns_the_mode_off():
    store = store_of(audit=1.0, limit=0.0)
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    with pytest.warns(RuntimeWarning, match="similar prompts are off"):
        ask(model, second)
    stats = store.stats()
    assert stats.similar_audits == 1
    assert stats.similar_kl > 0
    third = torch.cat([tokens(1, 9, seed=6), second[:, 17:]], 1)
    ask(model, third)
    assert store.stats().similar_hits == 1
    assert any(len(second[0]) < each.tokens for each in store.list()) is False, "what was approximate is not stored"


def test_the_turns_after_an_approximate_one_are_not_stored_either():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    before = len(store.list())
    cache = KVCache(model)
    reading = begin(store, cache, second[0].tolist())
    assert (reading.boundary, cache.approximate) == (second.shape[1] - 1, True)
    more = torch.cat([second, tokens(1, 20, seed=40)], 1)[0].tolist()
    with torch.no_grad():
        model(torch.tensor([more[reading.boundary :]]), past_key_values=cache)
    turn_after = begin(store, KVCache(model), more, restore=False, wait=False)
    store_in(turn_after, cache, 0, more)
    turn_after.close()
    assert len(store.list()) == before
    cache.reset()
    assert not cache.approximate


def test_the_engine_uses_similar_prompts():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    (out,) = LLM(model).generate([second[0].tolist()], SamplingParams(temperature=0.0, max_tokens=4))
    assert store.stats().similar_hits == 1
    assert len(store.list()) == 2, "the prompt and its answer of before"
    assert out.tokens == ask(model, second)[0, second.shape[1] :].tolist()


def test_deviating_tokens_are_computed_too():
    far = []
    for share in (0.0, 0.3, 0.9):
        store = store_of(deviating=share, audit=1.0, limit=100.0)
        model = model_of(store)
        first, second = moved()
        ask(model, first)
        ask(model, second)
        stats = store.stats()
        far.append((stats.similar_tokens, stats.similar_kl))
    saved, kl = zip(*far, strict=True)
    assert saved[0] == 95
    assert saved[1] == 95 - int(0.3 * 95)
    assert kl[2] < kl[0]


def test_the_end_of_a_prompt_is_computed():
    saved = []
    for last in (0, 1, 20):
        store = store_of(last=last)
        model = model_of(store)
        first, second = moved()
        ask(model, first)
        ask(model, second)
        saved.append(store.stats().similar_tokens)
    assert saved == [95, 94, 75]


@pytest.mark.parametrize("borrowed", [False, True])
def test_deviation_is_measured_against_what_a_cache_would_hold(borrowed):
    model, ids = tiny_model(), tokens(1, 40)
    if borrowed:
        model.config.dms_separate_alpha = False
    attach(model, chunk=16)
    assert require_attachment(model).borrowed is borrowed
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    (whole,) = cache.snapshot().segments
    first, count = (int(whole.counts[:n].sum()) for n in (1, 2))
    stored = whole.value[first:count].view(whole.counts.shape[1], 40, -1)
    torch.testing.assert_close(second_values(require_attachment(model), ids[0]), stored, atol=1e-5, rtol=1e-5)


def test_embeddings_are_counted_and_go_with_their_prompts():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    before = store.stats().memory_nbytes
    ask(model, second)
    index, width = store.index, model.config.hidden_size
    assert store.stats().memory_nbytes >= before + 2 * 4 * width, "the prompt's and its answer's"
    assert index.index_nbytes == sum(record.index_nbytes for record in index.records.values())
    (vectors,) = store.similar._vectors.values()
    assert sorted(map(str, vectors.ids())) == sorted(index.records)
    store.clear()
    assert (len(vectors), store.stats().memory_nbytes) == (0, 0)


@pytest.mark.parametrize("eviction", [None, Eviction(9, 1)], ids=str)  # with shift 1 nobody ever looks for similar ones
def test_nothing_stays_of_prompts_that_have_left(eviction):
    store, model = ReuseStore("60KB", shortest=8, similar=True), Model(eviction)
    for i in range(30):
        model.ask(store, [i, *(j % 50 for j in range(40))], check=False)
    known = [record for news in store.similar._news.values() for record in news.values()]
    assert len(known) == len(store.index.records) < 20
    store.clear()
    assert (store.similar._news, store.similar._vectors) == ({}, {})


def test_others_leave_for_an_embedding_within_the_budget():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    store = ReuseStore(store.stats().memory_nbytes + 100, shortest=8, similar=SimilarSettings(**EASY))
    model = model_of(store)
    ask(model, first)
    ask(model, second)
    stats = store.stats()
    assert (stats.similar_hits, stats.memory_records) == (1, 1), "the answer's record made room"
    assert stats.memory_nbytes <= store.index.memory.rules.budget


def test_tenants_never_mix():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    with store.request(tenant="a"):
        ask(model, first)
    with store.request(tenant="b"):
        ask(model, second)
        assert store.stats().similar_hits == 0
    with store.request(tenant="a"):
        ask(model, torch.cat([tokens(1, 9, seed=6), second[:, 17:]], 1))
        assert store.stats().similar_hits == 1


def test_explain_says_when_similar_prompts_would_help():
    store = store_of()
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    assert "similar" in store.explain(second).reason
    assert "similar" not in store.explain(first).reason
    assert "similar" not in store.explain(tokens(1, 60, seed=33)).reason


def test_what_cannot_be_turned_exactly_is_computed():
    for shift, dtype in ((1, None), (0, "int8")):
        store = store_of()
        model = tiny_model()
        attach(model, tiny_adapter(model, window=200, shift=shift), chunk=16, reuse=store, kv_dtype=dtype)
        first, second = moved()
        ask(model, first)
        ask(model, second)
        assert store.stats().similar_hits == 0


def test_an_embedding_of_ones_own_nominates():
    asked = []
    store = store_of(embed=lambda ids: asked.append(len(ids)) or [1.0, float(len(ids))])
    model = model_of(store)
    first, second = moved()
    ask(model, first)
    ask(model, second)
    assert store.stats().similar_hits == 1
    assert len(second[0]) in asked
    store.clear()
    ask(model, second[:, 1:])
    assert store.stats().similar_hits == 1, "what is deleted is nominated no more"


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 1},
        {"first": -1},
        {"last": 0.5},
        {"most": 2.0},
        {"audit": "x"},
        {"limit": -1},
        {"embed": 3},
        {"nominated": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SimilarSettings(**wrong)
    with pytest.raises(ConfigError, match="similar must be"):
        ReuseStore(similar="yes")
