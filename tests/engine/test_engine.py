"""The engine against `model.generate`: the same greedy tokens, whatever arrives, is cancelled or preempted."""

import random

import pytest
import torch

from octavo import ReuseStore, attach
from octavo.attachment import require_attachment
from octavo.engine import Engine, SamplingParams
from octavo.engine.request import Output, Request
from octavo.engine.scheduler import together
from octavo.errors import CacheBudgetError, ConfigError, PromptError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def attached(evict=True, **settings):
    model = tiny_model()
    return attach(model, tiny_adapter(model, window=12) if evict else None, **settings)


def expected(model, prompt, count):
    """What `generate` answers, alone."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def memory_of(model):
    attachment = require_attachment(model)
    memory = attachment.memory(attachment.modes.shape(attachment.swiftkv is not None))
    memory.reclaim()
    return memory


def finish(engine, most=3000):
    for _ in range(most):
        if not engine.unfinished:
            return
        engine.step()
    raise AssertionError("the engine does not get on")


@pytest.mark.parametrize("kind", ["dense", "gates", "swiftkv that hands on"])
@pytest.mark.parametrize("seed", range(5))
def test_any_mix_of_requests_answers_as_generate(kind, seed):
    dice = random.Random(seed)
    if kind == "swiftkv that hands on":
        model = model_of()
        attach(model, pair(model, 2, True, window=12, before=40))
    else:
        model = attached(kind == "gates")
    engine = Engine(model, max_batch=dice.choice([1, 3, 8]), step_tokens=dice.choice([1, 7, 64, 200]))
    engine.scheduler.padding = dice.choice([0.0, 1.5, 4.0])
    requests, cancelled = [], []
    for i in range(10):
        prompt = tokens(1, dice.choice([1, 2, 15, 40]), 100 * seed + i)[0].tolist()
        params = SamplingParams(max_tokens=dice.choice([1, 2, 9, 25]), **GREEDY)
        requests.append(engine.add(prompt, params, priority=dice.choice([0, 0, 1])))
        for _ in range(dice.choice([0, 1, 5])):
            engine.step()
        if dice.random() < 0.3:
            engine.preempt(dice.choice(requests))
        if dice.random() < 0.2:
            request = dice.choice(requests)
            if not request.done:
                engine.cancel(request)
                cancelled.append(request)
    finish(engine)
    for request in requests:
        wanted = expected(model, request.prompt, request.params.max_tokens)
        if request in cancelled:
            assert request.output.finish_reason == "cancelled"
            assert request.output.tokens == wanted[: len(request.output.tokens)]
        else:
            assert (request.output.finish_reason, request.output.tokens) == ("length", wanted)
    assert memory_of(model).sequences == memory_of(model).pool.held() == 0


def reads_of(engine):
    """How many prompts each forward of the engine reads, as they come."""
    sizes, alone, together = [], engine.runner.prefill, engine.runner.prefill_together
    engine.runner.prefill = lambda *args: (sizes.append(1), alone(*args))[1]
    engine.runner.prefill_together = lambda requests: (sizes.append(len(requests)), together(requests))[1]
    return sizes


@pytest.mark.parametrize("evict", [False, True])
def test_prompts_of_about_one_length_are_read_in_one_forward(evict):
    model = attached(evict)
    engine = Engine(model, max_batch=8, step_tokens=400)
    engine.scheduler.padding = 1.5
    sizes = reads_of(engine)
    lengths = [60, 33, 90, 70, 8, 9]  # 90, 70, 60 and 33 take 360 columns for 253 tokens, 9 and 8 take 18
    requests = [
        engine.add(tokens(1, n, n)[0].tolist(), SamplingParams(max_tokens=40 - n // 4, **GREEDY)) for n in lengths
    ]
    engine.step()
    assert sizes == [4, 2]
    cache, seen = engine.runner._batch, []
    while engine.unfinished:
        engine.step()
        seen.append(cache.seen)
    assert max(seen) > seen[-2], "columns that are padding in all that stay must go"
    for request in requests:
        assert request.output.tokens == expected(model, request.prompt, 40 - len(request.prompt) // 4)
    assert memory_of(model).pool.held() == 0


def test_prompts_that_cannot_be_read_together_are_read_alone():
    model = attached(evict=False, budget=12 * 65536)
    engine = Engine(model, max_batch=8, step_tokens=2000)
    engine.scheduler.padding = 1.5
    sizes = reads_of(engine)
    prompts = [tokens(1, 350, i)[0].tolist() for i in range(4)]  # of which two have room
    requests = [engine.add(p, SamplingParams(max_tokens=9, **GREEDY)) for p in prompts]
    finish(engine)
    assert sizes[:3] == [4, 1, 1]
    for request in requests:
        assert request.output.error is None
        assert request.output.tokens == expected(model, request.prompt, 9)
    fails = engine.add(prompts[0], SamplingParams(max_tokens=3, **GREEDY))
    well = engine.add(prompts[1], SamplingParams(max_tokens=3, **GREEDY))
    fails.prompt[5] = model.config.vocab_size  # no such token
    finish(engine)
    assert isinstance(fails.output.error, IndexError)
    assert well.output.tokens == expected(model, well.prompt, 3)
    assert memory_of(model).pool.held() == 0


@pytest.mark.parametrize("padding", [0.0, 1.5])
def test_a_request_that_names_no_token_of_the_model_is_refused_before_others_wait_for_it(padding):
    model = attached()
    engine = Engine(model, max_batch=4, step_tokens=400)
    engine.scheduler.padding = padding
    good = engine.add(tokens(1, 20, 1)[0].tolist(), SamplingParams(max_tokens=5, **GREEDY))
    for params in (SamplingParams(logit_bias={5000: 1.0}), SamplingParams(stop_token_ids=[97], min_tokens=2)):
        with pytest.raises(ConfigError, match="the model has tokens 0 to 96"):
            engine.add(tokens(1, 20, 2)[0].tolist(), params)
    finish(engine)
    assert good.output.tokens == expected(model, good.prompt, 5)
    assert len(engine._free) == 4


@pytest.mark.parametrize("padding", [0.0, 1.5])
def test_longer_prompts_do_not_go_before_those_that_came_first(padding):
    model = attached(evict=False, budget=12 * 65536)
    engine = Engine(model, max_batch=8, step_tokens=2000)
    engine.scheduler.padding = padding
    order, preempted = [], []
    alone, preempt = engine.runner.prefill, engine.runner.preempt
    engine.runner.prefill = lambda request, count: (order.append(request.number), alone(request, count))[1]
    engine.runner.preempt = lambda request: (preempted.append(request.number), preempt(request))
    first = engine.add(tokens(1, 60, 1)[0].tolist(), SamplingParams(max_tokens=4, **GREEDY))
    later = engine.add(tokens(1, 700, 2)[0].tolist(), SamplingParams(max_tokens=4, **GREEDY))
    urgent = engine.add(tokens(1, 8, 3)[0].tolist(), SamplingParams(max_tokens=4, **GREEDY), priority=-1)
    finish(engine)
    assert order[:3] == [urgent.number, first.number, later.number]
    assert preempted == []
    for request in (first, later, urgent):
        assert request.output.tokens == expected(model, request.prompt, 4)


def test_with_a_store_each_prompt_is_looked_up_by_itself():
    model = attached()
    engine = Engine(model, step_tokens=400)
    engine.scheduler.padding = 1.5
    require_attachment(model).reuse = store = ReuseStore(shortest=8)
    sizes = reads_of(engine)
    for _ in range(2):
        for i in range(3):
            engine.add(tokens(1, 40, i)[0].tolist(), SamplingParams(max_tokens=3, **GREEDY))
        finish(engine)
    assert set(sizes) == {1}
    assert store.stats().hits == 3


def test_which_prompts_are_read_together():
    def request(length, **has):
        made = Request(0, [1] * length, SamplingParams(), 0, None)
        made.output = Output(None, made.prompt)
        for name, value in has.items():
            setattr(made, name, value)
        return made, length

    a, b, c, d = (request(n) for n in (100, 80, 30, 5))
    part, begun = (request(70)[0], 40), request(60, read=10)
    several = request(50, siblings=2)
    reads = [b, part, d, begun, a, several, c]
    assert together(reads, 1.5) == [[a, b, c], [d], [part], [begun], [several]]
    assert together(reads, 0.0) == [[a], [b], [c], [d], [part], [begun], [several]]
    assert together(reads, 1.0) == together(reads, 0.0)
    assert together([a, a, c], 1.0) == [[a, a], [c]]
    assert together([], 1.5) == []


def test_memory_that_runs_short_preempts_and_answers_the_same():
    model = attached(evict=False, budget=12 * 65536)
    engine = Engine(model, max_batch=8, step_tokens=64)
    prompts = [tokens(1, 150, i)[0].tolist() for i in range(8)]
    requests = [engine.add(p, SamplingParams(max_tokens=60, **GREEDY)) for p in prompts]
    preempted, back = [], engine.scheduler.back
    engine.scheduler.back = lambda request: (preempted.append(request), back(request))
    finish(engine)
    assert preempted, "the budget was to be too small for all at once"
    for request in requests:
        assert request.output.error is None
        assert request.output.tokens == expected(model, request.prompt, 60)
    assert memory_of(model).pool.held() == 0


def test_a_request_that_can_never_fit_fails_alone():
    model = attached(evict=False, budget=12 * 65536)
    engine = Engine(model, step_tokens=64)
    big = engine.add(tokens(1, 1000, 1)[0].tolist(), SamplingParams(max_tokens=5, **GREEDY))
    small = engine.add(tokens(1, 30, 2)[0].tolist(), SamplingParams(max_tokens=5, **GREEDY))
    finish(engine)
    assert isinstance(big.output.error, CacheBudgetError)
    assert (big.output.finish_reason, small.output.finish_reason) == ("error", "length")
    assert small.output.tokens == expected(model, small.prompt, 5)


def test_samples_of_one_prompt_share_its_pages_and_differ():
    model = attached(evict=False)
    engine = Engine(model)
    prompt = tokens(1, 300, 3)[0].tolist()
    one = engine.add(prompt, SamplingParams(max_tokens=1, **GREEDY))
    finish(engine)
    request = engine.add(prompt, SamplingParams(n=8, seed=5, max_tokens=20, ignore_eos=True))
    most = 0
    while engine.unfinished:
        engine.step()
        most = max(most, memory_of(model).pool.held())
    alone = memory_of(model).layout.page_size
    members = [request, *request.family]
    assert len(members) == 8
    assert len({tuple(m.output.tokens) for m in members}) > 1
    rows = 300 // alone * 2 * 2  # at least: pages of one sequence in 2 layers and heads
    assert most < 8 * rows
    assert one.output.tokens == expected(model, prompt, 1)
    again = engine.add(prompt, SamplingParams(n=8, seed=5, max_tokens=20, ignore_eos=True))
    finish(engine)
    assert [m.output.tokens for m in (again, *again.family)] == [m.output.tokens for m in members]


def test_a_seed_answers_the_same_whatever_runs_beside_it():
    model = attached()
    prompt, params = tokens(1, 20, 4)[0].tolist(), SamplingParams(seed=9, max_tokens=15, ignore_eos=True)
    engine = Engine(model)
    alone = engine.add(prompt, params)
    finish(engine)
    for i in range(4):
        engine.add(tokens(1, 10 + i, i)[0].tolist(), SamplingParams(seed=i, max_tokens=30, ignore_eos=True))
    engine.step()
    among = engine.add(prompt, params)
    finish(engine)
    assert among.output.tokens == alone.output.tokens


def test_a_request_whose_grammar_raises_fails_alone():
    class Broken:
        vocab_size = 97

        def fill(self, bits):
            raise RuntimeError("no such rule")

        def accept(self, token):
            pass

    model = attached()
    engine = Engine(model)
    bad = engine.add(tokens(1, 5, 1)[0].tolist(), SamplingParams(max_tokens=9, **GREEDY))
    good = engine.add(tokens(1, 5, 2)[0].tolist(), SamplingParams(max_tokens=9, **GREEDY))
    bad.constraint = Broken()
    finish(engine)
    assert bad.output.finish_reason == "error"
    assert "no such rule" in str(bad.output.error)
    assert good.output.tokens == expected(model, good.prompt, 9)


def test_a_request_whose_listener_raises_fails_alone():
    def listen(request):
        if len(request.output.tokens) == 3:
            raise RuntimeError("enough")

    model = attached()
    engine = Engine(model)
    bad = engine.add(tokens(1, 5, 1)[0].tolist(), SamplingParams(max_tokens=9, **GREEDY), on_token=listen)
    good = engine.add(tokens(1, 5, 2)[0].tolist(), SamplingParams(max_tokens=9, **GREEDY))
    finish(engine)
    assert (bad.output.finish_reason, str(bad.output.error)) == ("error", "enough")
    assert good.output.tokens == expected(model, good.prompt, 9)


def test_many_requests_leave_nothing():
    dice, model = random.Random(0), attached(budget=40 * 65536)
    engine = Engine(model, max_batch=6, step_tokens=40)
    live = []
    for i in range(120):
        prompt = tokens(1, dice.randint(1, 60), i)[0].tolist()
        live.append(engine.add(prompt, SamplingParams(max_tokens=dice.randint(1, 12), seed=i)))
        for _ in range(dice.randint(0, 3)):
            engine.step()
        if dice.random() < 0.3:
            engine.cancel(dice.choice(live))
        if dice.random() < 0.2:
            engine.preempt(dice.choice(live))
    finish(engine)
    memory = memory_of(model)
    assert memory.sequences == memory.pool.held() == 0
    assert all(request.done and request.slot is None and request.cache is None for request in live)


@pytest.mark.parametrize("prompt", [[], [1] * 5000])
def test_impossible_prompts_are_refused(prompt):
    with pytest.raises(PromptError):
        Engine(attached()).add(prompt)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="max_batch"):
        Engine(attached(), max_batch=0)
    with pytest.raises(ConfigError, match="n is 9"):
        Engine(attached(), max_batch=8).add([1], SamplingParams(n=9))
