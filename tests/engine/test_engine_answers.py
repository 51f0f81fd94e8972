"""The engine gives whole answers again for equal requests whose tokens are certain, and for no others."""

import pytest
import torch

from octavo import AnswerSettings, ReuseStore, attach
from octavo.engine import Engine, SamplingParams
from octavo.reuse import Answered
from reuse.test_reuse_generate import Counted
from tiny import tiny_adapter, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"temperature": 0, "max_tokens": 6}


def gated(store):
    model = tiny_model()
    return attach(model, tiny_adapter(model), reuse=store)


def answer(engine, prompt, **params):
    seen = []
    request = engine.add(
        prompt, SamplingParams(**{**GREEDY, **params}), on_token=lambda r: seen.append(r.output.tokens[-1])
    )
    while not request.finished:
        engine.step()
    assert request.output.error is None
    assert seen == request.output.tokens or params.get("n", 1) > 1
    return request.output


def test_an_equal_request_is_answered_without_a_forward():
    store = ReuseStore("20MB", answers=True)
    engine, prompt = Engine(gated(store)), tokens(1, 80)[0].tolist()
    first = answer(engine, prompt)
    counted = Counted(engine.model)
    again = answer(engine, prompt)
    assert again == first
    assert again.finish_reason == "length"
    assert counted.tokens == 0
    assert store.stats().answers_given == 1
    stop = first.tokens[2]
    ended = answer(engine, prompt, stop_token_ids=(stop,))
    read = counted.tokens
    assert answer(engine, prompt, stop_token_ids=(stop,)) == ended
    assert ended.finish_reason == "stop"
    assert (counted.tokens, engine.unfinished) == (read, 0)


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"n": 2}, {"logprobs": 1}, {"stop": "x"}, {"max_tokens": 7}, {"min_tokens": 3}]
)
def test_another_request_is_computed(params):
    store = ReuseStore("20MB", answers=True)
    engine, prompt = Engine(gated(store)), tokens(1, 80)[0].tolist()
    answer(engine, prompt)
    answer(engine, prompt, **params)
    with store.request(tenant="another"):
        answer(engine, prompt)
    assert store.stats().answers_given == 0


def test_a_cancelled_or_similar_answer_is_not_kept():
    told: list[Answered] = []
    settings = AnswerSettings(similarity=0.9, report=told.append)
    store = ReuseStore("20MB", answers=settings)
    engine, prompt = Engine(gated(store)), tokens(1, 80)[0].tolist()
    request = engine.add(prompt, SamplingParams(**GREEDY))
    engine.step()
    engine.cancel(request)
    assert len(store.answers) == 0
    first = answer(engine, prompt)
    near = [*prompt[:-1], prompt[-1] ^ 1]
    assert answer(engine, near).tokens == first.tokens  # another prompt's, and said to be
    assert [each.matched for each in told] == [tuple(prompt)]
    assert len(store.answers) == 1


def test_what_a_user_adds_may_fail():
    def fails(given):
        raise OSError("no report")

    for settings in (AnswerSettings(report=fails), AnswerSettings(similarity=0.9, report=print, embed=fails)):
        engine, prompt = Engine(gated(ReuseStore("20MB", answers=settings))), tokens(1, 80)[0].tolist()
        with pytest.warns(RuntimeWarning, match=r"could not .* a whole answer.*OSError: no report"):
            assert answer(engine, prompt) == answer(engine, prompt)
        assert engine.unfinished == 0


def test_other_weights_give_other_answers():
    store = ReuseStore("20MB", answers=True)
    model = gated(store)
    engine, prompt = Engine(model), tokens(1, 80)[0].tolist()
    answer(engine, prompt)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    changed = answer(engine, prompt)
    assert store.stats().answers_given == 0
    assert changed.tokens == model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, 80:].tolist()
