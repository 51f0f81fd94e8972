"""Prompts from graphs, without a GPU: what a graph would do is run by hand, in Triton's interpreter.

`tests/test_cuda.py` tests the graphs themselves.
"""

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("tests/test_cuda.py captures real graphs", allow_module_level=True)

from octavo import KVCache, ReuseStore, attach
from octavo.attachment import compiled as compiled_code
from octavo.attachment import prompt_graphs, require_attachment
from octavo.attachment.attachment import Attachment, fill
from octavo.attachment.graphs import Graphs
from octavo.attention import cuda
from octavo.engine import Engine, SamplingParams
from octavo.errors import CacheBudgetError
from tiny import check_answers, in_pieces, tiny_adapter, tiny_model, tokens
from tiny_swift import full, model_of, pair


class ByHand:
    """In place of a captured graph: runs anew what was recorded, and writes where the graph would."""

    def __init__(self, run):
        self.run, self.out, self.replays = run, run(), 0

    def replay(self):
        self.out.copy_(self.run())
        self.replays += 1


def recorded(rehearse, run, device, pool):
    graph = ByHand(run)
    return graph, graph.out


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda device: True)
    monkeypatch.setattr(prompt_graphs, "recorded", recorded)
    monkeypatch.setattr(Graphs, "suits", lambda *args: False)  # decode steps run as they are
    monkeypatch.setattr(prompt_graphs, "OFTEN", 1)


def replays(model):
    return {kind: each.graph.replays for kind, each in require_attachment(model).prompts._captured.items()}


def state_of(cache):
    """What later steps go on from: visible slots, positions, and what can be taken back."""
    sequences = cache.sequences
    return cache.kept.clone(), cache.position, cache.tables.lost[sequences.index].clone()


@pytest.mark.parametrize(
    ("evict", "kv_dtype", "padded"), [(False, None, True), (True, None, False), (True, "int8", True)]
)
def test_prompts_and_what_follows_them_are_those_of_the_model(evict, kv_dtype, padded):
    model = tiny_model()
    adapter = tiny_adapter(model, window=8) if evict else None
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, :7] = not padded
    found, settings = {}, {"kv_dtype": kv_dtype}
    for graphs in (True, False):
        attach(model, adapter, cuda_graphs=graphs, **settings)
        for length in (19, 20, 23):
            ids = tokens(2, length + 41, seed=length)
            logits, cache = in_pieces(model, ids, [length, 23, 1, 17], mask if padded else None)
            found.setdefault(length, []).append((logits[mask[:, : length + 41].bool()], *state_of(cache)))
        if graphs:
            assert sorted((columns, goes_on) for _, columns, _, goes_on, *_ in replays(model)) == [
                (24, False),
                (24, True),
            ]
            assert sum(replays(model).values()) > 4
    for (got, *state), (expected, *others) in found.values():
        # Keys that differ in their last bit may be other codes, and then a gate may decide otherwise.
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 if kv_dtype else 1e-4)
        assert kv_dtype or all(map(torch.equal, state, others))
        assert torch.equal(state[1], others[1])


@pytest.mark.parametrize("before", [0, 40])
@pytest.mark.parametrize("keep", [0, 1, 5])
def test_skipping_prompts_are_the_full_forward(keep, before):
    model = model_of()
    attach(model, pair(model, 2, True, before=before), cuda_graphs=True)
    for turn in range(2):
        ids, cache = tokens(1, 54, seed=turn), KVCache(model)
        expected = full(model, ids)
        with torch.no_grad():
            if keep == 0:
                fill(model, ids[:, :18], cache)
            first = model(ids[:, 18 * (keep == 0) : 36], past_key_values=cache, logits_to_keep=keep or 1).logits
            rest = model(ids[:, 36:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat([first, rest], 1), expected[:, 36 - (keep or 1) :], rtol=0, atol=1e-4)
    kept = {kind[2] for kind in replays(model)}
    assert kept == {0: {0, 1, 2}, 1: {1, 2}, 5: {2}}[keep]


def test_prompts_are_captured_with_additions_that_wait_for_norms(monkeypatch):
    fused, real = [], compiled_code.with_sum
    monkeypatch.setattr(compiled_code, "_compiled", lambda function, dynamic: function)
    monkeypatch.setattr(Attachment, "_compiles", lambda self: True)
    monkeypatch.setattr(compiled_code, "with_sum", lambda norm: lambda *args: fused.append(norm) or real(norm)(*args))
    monkeypatch.setattr(prompt_graphs, "OFTEN", 2)
    model, ids = tiny_model(), tokens(2, 40)
    adapter = tiny_adapter(model, window=8)
    attach(model, adapter)
    expected = in_pieces(model, ids, [40])[0]
    attach(model, adapter, cuda_graphs=True, compile=True)
    found = []
    for _ in range(3):
        torch.testing.assert_close(in_pieces(model, ids, [40])[0], expected, rtol=0, atol=1e-5)
        found.append(len(fused))
    assert found[0] == 0, "as it is, where nothing is captured"
    assert found[1] == found[2] == 2 * len(model.model.layers)


def test_the_engine_answers_as_generate():
    model, rng = tiny_model(), random.Random(4)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    engine, requests = Engine(model, max_batch=3, step_tokens=40), []
    while len(requests) < 9 or engine.unfinished:
        if len(requests) < 9 and rng.random() < 0.7:
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=rng.randint(1, 5))
            length = rng.choice([20, 22, 24, 38])
            requests.append(engine.add(tokens(1, length, len(requests))[0].tolist(), params))
        if engine.scheduler.running and rng.random() < 0.1:
            engine.preempt(rng.choice(engine.scheduler.running))
        engine.step()
    assert sum(replays(model).values()) > 2
    attach(model, tiny_adapter(model, window=8))
    check_answers(model, requests)


def test_a_store_finds_boundaries_within_replayed_prompts():
    store = ReuseStore("20MB", shortest=8, back=24)
    model = tiny_model()
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True, reuse=store)
    options = {"do_sample": False, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    stem, answers = tokens(1, 90)[0], []
    asked = [torch.cat([stem[:keep], tokens(1, 9, seed=i)[0]])[None] for i, keep in enumerate([90, 90, 50, 90])]
    answers = [model.generate(ids, **options) for ids in asked]
    assert store.stats().reused > 0
    assert sum(replays(model).values()) > 0
    attach(model, tiny_adapter(model, window=8))
    for ids, got in zip(asked, answers, strict=True):
        expected = model.generate(ids, **options)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_positions_that_are_given_are_those_of_the_graph():
    model = tiny_model()
    attach(model, cuda_graphs=True)
    ids, positions, found = tokens(1, 22), torch.arange(22)[None] * 2 + 5, []
    caches = [KVCache(model) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            found.append(model(ids, position_ids=positions, past_key_values=cache).logits)
    assert sum(replays(model).values()) == 3
    assert all(bool(cache.moved) for cache in caches)
    attach(model)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, past_key_values=KVCache(model)).logits
    for got in found:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (expected - in_pieces(model, ids, [22])[0]).abs().max() > 0.1


def test_a_budget_that_is_reached_leaves_the_cache_as_it_was():
    model, ids = tiny_model(), tokens(1, 400)
    attach(model, cuda_graphs=True, budget=2**18, chunk=64)
    for _ in range(3):
        cache = KVCache(model)
        with torch.no_grad():
            first, refused = model(ids[:, :64], past_key_values=cache).logits, 0
            for at in range(64, 400, 64):
                try:
                    model(ids[:, at : at + 64], past_key_values=cache)
                except CacheBudgetError:
                    refused += 1
            assert refused > 0
            read = cache.seen
            cache.crop(-2)
            got = model(ids[:, read - 2 : read], past_key_values=cache).logits
            expected = model(ids[:, :read], use_cache=False).logits
        torch.testing.assert_close(first, expected[:, :64], rtol=0, atol=1e-4)
        torch.testing.assert_close(got, expected[:, -2:], rtol=0, atol=1e-4)
        cache.reset()
    assert sum(replays(model).values()) > 2


def test_a_model_that_cannot_be_captured_runs_as_before(monkeypatch):
    def fails(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(prompt_graphs, "recorded", fails)
    model, ids = tiny_model(), tokens(1, 40)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
            parts = [in_pieces(model, ids, [40])[0]]
        parts += [in_pieces(model, ids, [40])[0] for _ in range(2)]  # nobody tries again
    for got in parts:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert replays(model) == {}


def test_a_model_that_asks_the_device_is_not_captured():
    model, ids = tiny_model(), tokens(1, 40)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: (bool(out.sum() > 0), None)[1])
    with pytest.warns(UserWarning, match="asks the device for values"):
        first, cache = in_pieces(model, ids, [40])
    assert replays(model) == {}
    assert cache.seen == 40
    again, _ = in_pieces(model, ids, [40])  # nobody tries again
    assert torch.equal(again, first)
    hook.remove()
    in_pieces(model, ids, [20])
    assert len(replays(model)) == 1


def test_graphs_are_made_anew_where_parameters_move_and_the_last_used_stay(monkeypatch):
    model, ids = tiny_model(), tokens(1, 60)
    attach(model, cuda_graphs=True)
    for _ in range(2):
        in_pieces(model, ids, [40])
    before = require_attachment(model).prompts._captured.copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.01
        expected = model(ids[:, :40], use_cache=False).logits
    got, _ = in_pieces(model, ids, [40])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    (kind,) = before
    assert require_attachment(model).prompts._captured[kind] is not before[kind]


def test_where_all_places_are_taken_what_comes_twice_as_often_gets_one(monkeypatch):
    model, ids = tiny_model(), tokens(1, 60)
    attach(model, cuda_graphs=True)
    monkeypatch.setattr(prompt_graphs, "GRAPHS", 2)
    for length in (20, 40, 18, 39):
        in_pieces(model, ids, [length])
    kinds = [[each[1] for each in replays(model)]]
    for _ in range(5):  # the oldest has come twice
        in_pieces(model, ids, [50])
        kinds.append([each[1] for each in replays(model)])
    assert kinds == [[24, 40]] * 5 + [[40, 56]]
    monkeypatch.setattr(prompt_graphs, "HALVED", 10)
    in_pieces(model, ids, [50])
    assert sum(require_attachment(model).prompts._came.values()) == 1 + 1 + 3  # 2, 2 and 6


def test_what_a_prompt_gave_stays_what_it_is():
    model = tiny_model()
    attach(model, cuda_graphs=True)
    with torch.no_grad():
        hidden = [
            model.model(tokens(1, 24, seed=i), past_key_values=KVCache(model)).last_hidden_state for i in (1, 2, 3)
        ]
        expected = [model.model(tokens(1, 24, seed=i), use_cache=False).last_hidden_state for i in (1, 2, 3)]
    for got, right in zip(hidden, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4)


def test_sequences_in_other_rows_and_tables_that_have_grown():
    model, ids = tiny_model(), tokens(4, 60)
    attach(model, tiny_adapter(model, window=8), cuda_graphs=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        caches = [KVCache(model) for _ in range(4)]  # all stay, so each has a row of its own
        for i, cache in enumerate(caches):
            model(ids[i : i + 1, :20], past_key_values=cache)
        prompts, seen = require_attachment(model).prompts, []
        for i in (2, 0, 3):
            got = model(ids[i : i + 1, 20:40], past_key_values=caches[i]).logits
            torch.testing.assert_close(got, expected[i : i + 1, 20:40], rtol=0, atol=1e-4)
            seen.append(next(each for kind, each in prompts._captured.items() if kind[3]))
        assert seen[0] is seen[1] is seen[2]
        many = [KVCache(model) for _ in range(40)]  # for which the tables have no rows yet
        before = caches[1].tables.generation
        for cache in many:
            model(ids[:1, :1], past_key_values=cache)
        assert caches[1].tables.generation > before
        got = model(ids[1:2, 20:40], past_key_values=caches[1]).logits
        torch.testing.assert_close(got, expected[1:2, 20:40], rtol=0, atol=1e-4)
        assert next(each for kind, each in prompts._captured.items() if kind[3]) is not seen[0]


def test_too_little_memory_for_a_graph_is_no_verdict(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, ids = tiny_model(), tokens(1, 24)
    attach(model, cuda_graphs=True)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_graphs, "recorded", fails)
        first, _ = in_pieces(model, ids, [24])
    assert replays(model) == {}
    second, _ = in_pieces(model, ids, [24])
    assert len(replays(model)) == 1
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


def test_a_warning_that_is_an_error_is_given_once(monkeypatch):
    tried = []

    def fails(*args):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(prompt_graphs, "recorded", fails)
    model, ids = tiny_model(), tokens(1, 24)
    attach(model, cuda_graphs=True)
    with pytest.raises(UserWarning):  # as this project's tests have it
        in_pieces(model, ids, [24])
    _, cache = in_pieces(model, ids, [24])
    assert (cache.seen, len(tried)) == (24, 1)


def test_buckets_are_few_and_a_quarter_too_large_at_most():
    sizes = {n: prompt_graphs.bucket(n) for n in range(9, 8193)}
    assert all(n <= size <= max(n + 7, 1.25 * n) for n, size in sizes.items())
    assert len(set(sizes.values())) < 40
    assert sizes[8192] == 8192
