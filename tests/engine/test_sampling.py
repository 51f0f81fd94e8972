"""Filters, penalties and batches: the sampler against one row after another in plain Python."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_sampling import changed, filters, kept, logit_rows, one, quick, requests, stays

from octavo.engine.sampling import Sampler, SamplingParams, Work, likeliest
from octavo.errors import ConfigError


@quick
@given(logit_rows, filters)
def test_filters(logits, params):
    expected, near = kept(logits, params)
    assert stays(logits, params) ^ expected <= near


@quick
@given(logit_rows, filters, filters)
def test_filters_do_not_depend_on_who_else_is_there(logits, params, companion):
    assert stays(logits, params, companion) == stays(logits, params)


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}])
def test_equal_tokens_stay_together(params):
    assert stays([1.0, 1.0, 1.0], SamplingParams(**params)) == {0, 1, 2}
    assert stays([0.0, 5.0, -math.inf, 5.0], SamplingParams(**params)) == {1, 3}
    assert stays([3.0], SamplingParams(**params)) == {0}


def test_top_p_counts_what_is_likelier():
    logits = [math.log(p) for p in (0.125, 0.5, 0.25, 0.125)]
    sizes = {0.4: 1, 0.49: 1, 0.51: 2, 0.74: 2, 0.76: 4, 0.99: 4}
    assert {p: len(stays(logits, SamplingParams(top_p=p))) for p in sizes} == sizes
    assert stays(logits, SamplingParams(top_p=0.7, top_k=2)) == {1, 2}
    assert stays(logits, SamplingParams(top_p=0.6, top_k=2)) == {1}  # 2/3 of what top_k leaves
    assert stays(logits, SamplingParams(top_p=0.7, min_p=0.5)) == {1, 2}
    many = [1.0, *[0.0] * 20]  # top_k 2 leaves all that are equal: the first is 0.12 of them, not 0.73
    assert len(stays(many, SamplingParams(top_p=0.5, top_k=2))) == 21


penalties = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 1.5]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.floats(-9, 9, width=32), max_size=5),
    min_tokens=st.sampled_from([0, 1, 4]),
    stop_token_ids=st.lists(st.integers(0, 11), max_size=2),
    ignore_eos=st.booleans(),
)
ids = st.lists(st.integers(0, 11), max_size=8)


@quick
@given(st.lists(st.floats(-6, 6, width=32), min_size=12, max_size=12), penalties, ids, ids)
def test_penalties_and_bias(logits, params, prompt, output):
    eos, seen = (3, 5), []
    sampler = Sampler(1, 12, "cpu", eos=eos)
    sampler.add(0, params, prompt, 0, output)
    for _ in range(4):  # what is drawn counts
        scores = changed(logits, params, prompt, [*output, *seen], eos)
        position = torch.tensor([len(prompt) + len(output) + len(seen)], dtype=torch.int32)
        token = int(sampler.sample(torch.tensor([logits]), torch.tensor([0]), position).tokens)
        assert scores[token] >= max(scores) - 1e-4
        seen.append(token)


def test_no_end_comes_too_early():
    """Two tokens are due before the ends 1 and 3, at positions 2 and 3 after a prompt of two."""
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[3], logit_bias={0: 0.5, 1: 0.5})
    for settings_, expected in ((params, [0, 0, 3, 3]), (replace(params, ignore_eos=True), [1, 1, 3, 3])):
        said = [one([1.0, 2.0, 0.0, 4.0], settings_, prompt=(0, 0), eos=(1,), position=2 + i)[0] for i in range(4)]
        assert [int(each.tokens) for each in said] == expected


@pytest.mark.parametrize(("first", "seen"), [(0.4, 1), (-0.4, 1), (-2.0, 1), (0.0, 0)])
def test_the_repetition_penalty_by_sign(first, seen):
    """Token 0 is in the prompt. Its logit goes down towards 0 from above and away from it below."""
    after = first / 1.5 if first > 0 else first * 1.5
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    assert int(one([first, (first + after) / 2 - 1e-3], params)[0].tokens) == seen
    assert int(one([first, after - 1e-3], params)[0].tokens) == 0


def test_a_slot_remembers_nothing_of_who_had_it_before():
    sampler, row = Sampler(1, 4, "cpu"), torch.tensor([[1.0, 0.9, 0.8, 0.7]])

    def says(prompt, **given_params):
        sampler.add(0, SamplingParams(temperature=0, **given_params), prompt, 0)
        at = torch.tensor([len(prompt)])
        said = [int(sampler.sample(row, torch.tensor([0]), at + i).tokens) for i in range(2)]
        sampler.remove(0)
        return said

    assert says([0, 1], repetition_penalty=2.0, logit_bias={0: -9.0, 1: -8.0, 3: 7.0}) == [3, 3]
    assert says([3], repetition_penalty=2.0, logit_bias={2: 0.01}) == [0, 1]
    assert says([], frequency_penalty=0.15) == [0, 1]


@settings(deadline=None, max_examples=60)
@given(st.lists(requests, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_request_says_the_same_alone_and_in_any_batch(all_params, dice):
    """Batches with rows in any order, requests that sit a step out, others that come and go."""
    n, V, steps = len(all_params), 37, 4
    table = torch.randn(n, steps, V, generator=torch.Generator().manual_seed(dice.randrange(2**30))).bfloat16() * 3
    prompts = [[dice.randrange(V) for _ in range(dice.randrange(1, 5))] for _ in range(n)]
    alone = []
    for i, params in enumerate(all_params):
        sampler = Sampler(1, V, "cpu", eos=(7,))
        sampler.add(0, params, prompts[i], i)
        places = [len(prompts[i]) + s for s in range(steps)]
        said = [sampler.sample(table[i, s : s + 1], torch.tensor([0]), torch.tensor([places[s]])) for s in range(steps)]
        alone.append([int(each.tokens) for each in said])
    sampler = Sampler(n, V, "cpu", eos=(7,))
    slots, together, live = dice.sample(range(n), n), [[] for _ in range(n)], set()
    while any(len(said) < steps for said in together):
        i = dice.randrange(n)
        if i not in live and len(together[i]) < steps:
            sampler.add(slots[i], all_params[i], prompts[i], i, together[i])
            live.add(i)
        elif i in live and (len(together[i]) == steps or dice.random() < 0.2):
            sampler.remove(slots[i])  # done, or preempted
            live.remove(i)
        rows = [i for i in live if len(together[i]) < steps and dice.random() < 0.8]
        dice.shuffle(rows)
        logits = torch.stack([table[i, len(together[i])] for i in rows]) if rows else table[0, :0]
        where = torch.tensor([slots[i] for i in rows], dtype=torch.int64)
        place = torch.tensor([len(prompts[i]) + len(together[i]) for i in rows], dtype=torch.int64)
        for i, token in zip(rows, sampler.sample(logits, where, place).tokens.tolist(), strict=True):
            together[i].append(token)
    assert together == alone


def test_greedy_takes_the_first_of_the_largest_in_any_dtype():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-math.inf, -5.0, -math.inf]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for other in ({}, {"logit_bias": {0: -1.0}}, {"presence_penalty": 1.0}, {"temperature": 1.0}):
            sampler = Sampler(2, 3, "cpu")
            sampler.add(0, SamplingParams(temperature=0, top_k=2, top_p=0.1, min_p=0.5), [0], 0)
            sampler.add(1, SamplingParams(**{"temperature": 0, **other}), [0], 0)
            given_logits = logits.to(dtype)
            tokens = sampler.sample(given_logits, torch.zeros(3).long(), torch.arange(3)).tokens
            assert tokens.tolist() == [1, 0, 1]
            assert torch.equal(given_logits, logits.to(dtype))


def test_logprobs_are_the_raw_models():
    logits = [0.5, 3.0, -1.0, 2.0]
    params = SamplingParams(logprobs=2, logit_bias={2: 100}, temperature=0.1, top_k=1, repetition_penalty=1.5)
    sampled, sampler = one(logits, params, prompt=(1,))
    expected = torch.tensor(logits).log_softmax(0)
    assert sampled.tokens.tolist() == [2]
    torch.testing.assert_close(sampled.logprobs, expected[2:3])
    assert sampled.top_tokens.tolist() == [[1, 3]]
    torch.testing.assert_close(sampled.top_logprobs, expected[[1, 3]][None])
    assert sampled.alternatives(0, 1) == pytest.approx({1: float(expected[1]), 2: float(expected[2])})
    sampler.remove(0)
    plain, _ = one(logits, SamplingParams(logprobs=0))
    assert plain.top_tokens is None
    torch.testing.assert_close(plain.logprobs, expected[plain.tokens])
    many, _ = one(logits, SamplingParams(logprobs=50))
    assert many.top_tokens.shape == (1, 4)
    assert one(logits, SamplingParams())[0].logprobs.isnan().all()


def test_only_what_is_asked_for_is_done():
    V = 11
    calls = []
    sampler = Sampler(3, V, "cpu", eos=(1,))

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def work(rows=2):
        calls.clear()
        logits, slots, position = torch.randn(rows, V), torch.arange(rows), torch.arange(rows)
        with Recorder():
            sampler.sample(logits, slots, position)
        return set(calls)

    sampler.add(0, SamplingParams(temperature=0, top_k=3, top_p=0.5), [1], 0)
    assert work() == {"argmax", "expand"}
    assert sampler.work == Work()
    sampler.add(1, SamplingParams(), [1], 0)
    assert not {"sort", "topk", "amax", "cumsum", "logsumexp"} & work()
    sampler.add(2, SamplingParams(top_k=3), [1], 0)
    assert "topk" in work()
    assert not {"sort", "cumsum", "exp_"} & set(calls)
    sampler.remove(2)
    assert sampler._counts is None
    sampler.add(2, SamplingParams(temperature=0, frequency_penalty=1.0), [1], 0)
    assert "scatter_add_" in work()
    assert sampler._counts is not None
    assert sampler._prompts is None
    for slot in range(3):
        sampler.remove(slot)
    sampler.add(0, SamplingParams(temperature=0), [1], 0)
    assert work() == {"argmax", "expand"}
    assert not {"item", "_local_scalar_dense", "nonzero"} & set(calls)


def test_bad_rows_hurt_nobody_else():
    V = 9
    sampler = Sampler(3, V, "cpu")
    made = [SamplingParams(top_p=0.9, min_p=0.1, top_k=4 * i, repetition_penalty=1.1, logprobs=1) for i in range(3)]
    for slot, params in enumerate(made):
        sampler.add(slot, params, [1], slot)
    good = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    logits = torch.cat([torch.full((1, V), math.nan), good, torch.full((1, V), -math.inf)])
    sampled = sampler.sample(logits, torch.arange(3), torch.full((3,), 1))
    again, _ = one(good[0].tolist(), made[1], seed=1, prompt=(1,))
    assert sampled.tokens[1] == again.tokens[0]
    assert sampled.tokens.min() >= 0
    assert sampled.tokens.max() < V
    assert sampled.logprobs.isnan().tolist() == [True, False, True]


def test_rows_without_a_request_and_batches_without_rows():
    sampler = Sampler(2, 6, "cpu")
    for slot in range(2):
        sampler.add(slot, SamplingParams(frequency_penalty=1.0, top_p=0.9, logprobs=2, logit_bias={2: 1.0}), [0], slot)
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).expand(4, 6)
    slots, position = torch.tensor([1, 2, 2, 0]), torch.tensor([1, 0, 0, 1])
    sampled = sampler.sample(logits, slots, position)
    assert sampled.tokens[1:3].tolist() == [int(logits[0].argmax())] * 2
    empty = sampler.sample(logits[:0], slots[:0], position[:0])
    assert empty.tokens.shape == empty.logprobs.shape == (0,)


def test_tokens_beyond_the_vocabulary_are_refused_and_change_nothing():
    sampler = Sampler(1, 6, "cpu", eos=(2, 900))
    for bad in ({"logit_bias": {6: 1.0}}, {"stop_token_ids": [7], "min_tokens": 1}):
        with pytest.raises(ConfigError, match="the model has tokens 0 to 5"):
            sampler.add(0, SamplingParams(**bad), [0], 0)
    sampler.add(0, SamplingParams(min_tokens=1, repetition_penalty=2.0), [0, 77], 0)
    assert sampler.work.edits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_gpu_says_the_same_and_never_waits():
    V, n, dice = 5000, 24, random.Random(0)
    samplers = [Sampler(n, V, device, eos=(7,)) for device in ("cpu", "cuda")]
    for slot in range(n):
        params = SamplingParams(
            temperature=dice.choice([0, 0.7, 1.5]),
            top_k=dice.choice([0, 40]),
            top_p=dice.choice([0.9, 1.0]),
            min_p=dice.choice([0, 0.05]),
            repetition_penalty=dice.choice([1.0, 1.2]),
            frequency_penalty=dice.choice([0.0, 0.2]),
            logit_bias=dice.choice([{}, {4: 3.0, 9: -100.0}]),
            min_tokens=dice.choice([0, 5]),
            logprobs=dice.choice([None, 3]),
        )
        prompt = [dice.randrange(V) for _ in range(9)]
        for sampler in samplers:
            sampler.add(slot, params, prompt, slot)
    logits = torch.randn(30, n, V, generator=torch.Generator().manual_seed(0)) * 3
    there, slots, position = logits.cuda(), torch.arange(n), torch.full((n,), 9)
    on_gpu, where, place = [], slots.cuda(), position.cuda()
    try:
        for step in range(30):
            if step == 3:  # the first steps load kernels, which waits
                torch.cuda.set_sync_debug_mode("error")
            on_gpu.append(samplers[1].sample(there[step], where, place + step))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, found in enumerate(on_gpu):
        expected = samplers[0].sample(logits[step], slots, position + step)
        assert torch.equal(found.tokens.cpu(), expected.tokens)
        torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.top_logprobs.cpu(), expected.top_logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [1, 7, 128, 96 * 128, 1000])
def test_the_likeliest_of_parts_is_that_of_the_row(width):
    scores = torch.randint(0, 5, (6, width)).bfloat16()  # with many that are equal
    scores[1] = -torch.inf
    scores[2, width // 2] = torch.nan
    for parts in (1, 4, 128):
        assert torch.equal(likeliest(scores, parts), scores.argmax(-1))
