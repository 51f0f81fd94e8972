"""Whole answers are given again for the same call alone, and for similar prompts where the user says how near."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from octavo import AnswerSettings, ReuseStore
from octavo.errors import ConfigError
from reuse.test_reuse_generate import SETTINGS, Counted, gated
from tiny import tokens

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def store_of(answers=True, **options):
    return ReuseStore("20MB", answers=answers, **SETTINGS, **options)


class Quiet(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def test_the_same_call_is_answered_without_a_forward():
    store = store_of()
    model, ids = gated(reuse=store), tokens(1, 40)
    expected = gated().generate(ids, **GREEDY)
    counted = Counted(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    read, counted.tokens = counted.tokens, 0
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(inputs=ids, attention_mask=torch.ones_like(ids), **GREEDY), expected)
    assert (read, counted.tokens) == (45, 0)
    assert store.stats().answers_given == 2
    assert 0 < store.stats().answers_nbytes < 4096


def test_another_call_is_computed():
    store = store_of()
    model, ids = gated(reuse=store), tokens(1, 40)
    model.generate(ids, **GREEDY)
    other = ids.clone()
    other[0, -1] += 1
    for given in (
        {"inputs": other, **GREEDY},
        {"inputs": ids, "do_sample": False, "max_new_tokens": 7},
        {"inputs": ids, "do_sample": True, "max_new_tokens": 6},
        {"inputs": ids, "streamer": Quiet(), **GREEDY},
        {"inputs": ids, "output_logits": True, "return_dict_in_generate": True, **GREEDY},
        {"inputs": ids, "repetition_penalty": 1.5, **GREEDY},
        {"inputs": ids, "generation_config": GenerationConfig(max_new_tokens=6, min_new_tokens=2)},
    ):
        model.generate(**given)
        with store.request(tenant="another"):
            model.generate(**given)
    assert store.stats().answers_given == 0
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert store.stats().answers_given == 1, "the second of the other output layer's"


def test_answers_expire_are_deleted_and_leave_within_their_budget():
    now = [0.0]
    store = store_of(AnswerSettings(memory=4000), clock=lambda: now[0], ttl=10)
    model = gated(reuse=store)

    def given(ids):
        before = store.stats().answers_given
        model.generate(ids, **GREEDY)
        assert store.stats().answers_nbytes <= 4000
        return store.stats().answers_given - before

    a, b, c, d = (tokens(1, 40, seed=seed) for seed in range(4))
    assert [given(each) for each in (a, a, b, a, c, a, b)] == [0, 1, 0, 1, 0, 1, 0]
    now[0] = 11.0
    assert given(a) == 0
    assert given(a) == 1
    store.delete(prefix=a[:, :20])
    assert (given(a), given(a)) == (0, 1)
    with store.request(tags=["draft"]):
        given(d)
    store.delete(tag="draft")
    assert (given(a), given(d)) == (1, 0)
    store.clear()
    assert (store.stats().answers_nbytes, given(d)) == (0, 0)
    assert given(tokens(1, 900)) == given(tokens(1, 900)) == 0, "larger than the budget"


def test_similar_prompts_are_answered_above_the_users_threshold_and_reported():
    told = []
    store = store_of(AnswerSettings(similarity=0.9, report=told.append))
    model, ids = gated(reuse=store), tokens(1, 40)
    near, far = ids.clone(), tokens(1, 40, seed=9)
    near[0, 20] += 1
    first = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(near, **GREEDY)[:, 40:], first[:, 40:])
    model.generate(far, **GREEDY)
    (only,) = told
    assert (only.prompt, only.matched) == (tuple(near[0].tolist()), tuple(ids[0].tolist()))
    assert 0.9 <= only.similarity < 1
    assert only.answer == tuple(first[0, 40:].tolist())
    store.delete(prefix=ids)
    model.generate(near, **GREEDY)
    assert len(told) == 1


@pytest.mark.parametrize(
    "wrong", [{"memory": 0}, {"similarity": 2.0}, {"similarity": True}, {"similarity": 0.9}, {"embed": 3}]
)
def test_impossible_settings_of_answers_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be"):
        AnswerSettings(**wrong)
    with pytest.raises(ConfigError, match="answers must be"):
        ReuseStore(answers="yes")
