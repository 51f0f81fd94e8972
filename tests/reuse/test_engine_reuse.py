"""The engine with a store answers as it does without one, and reads only what is new."""

import pytest
import torch

from octavo import LLM, ReuseStore, SamplingParams
from reuse.test_reuse_generate import MODELS, SETTINGS, Counted
from tiny import tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["dense", "gates", "gates, shift 1"])
def test_answers_are_the_same_and_a_shared_document_is_read_once(name, tmp_path):
    document = tokens(1, 100)[0].tolist()
    prompts = [document + tokens(1, 10 + i, seed=5 + i)[0].tolist() for i in range(5)]
    params = SamplingParams(max_tokens=7, temperature=0.0)
    plain = LLM(MODELS[name](), step_tokens=48)
    expected = [each.tokens for each in plain.generate(prompts, params)]
    store = ReuseStore("50MB", tmp_path, **SETTINGS)
    model = MODELS[name](reuse=store)
    counted, llm = Counted(model), LLM(model, step_tokens=48)
    assert [each.tokens for each in llm.generate(prompts, params)] == expected
    assert counted.tokens == 100 + sum(len(p) - 100 for p in prompts) + 5 * 6
    store.close()
    again = LLM(MODELS[name](reuse=ReuseStore(None, tmp_path, **SETTINGS)), step_tokens=48)
    assert [each.tokens for each in again.generate(prompts, params)] == expected
    turn = prompts[0] + expected[0] + tokens(1, 9, seed=99)[0].tolist()
    assert again.generate([turn], params)[0].tokens == plain.generate([turn], params)[0].tokens
    assert again.model._octavo.reuse.stats().reused == sum(len(p) - 1 for p in prompts) + len(turn) - 10


def test_preempted_cancelled_and_several_samples():
    store = ReuseStore("50MB", **SETTINGS)
    llm, plain = LLM(MODELS["gates"](reuse=store)), LLM(MODELS["gates"]())
    prompt = tokens(1, 80)[0].tolist()
    params = SamplingParams(max_tokens=9, temperature=0.0)
    expected = plain.generate([prompt], params)[0].tokens
    for _ in range(2):
        request = llm.engine.add(prompt, params)
        for _ in range(4):
            llm.engine.step()
        llm.engine.preempt(request)
        while not request.done:
            llm.engine.step()
        assert request.output.tokens == expected
    request = llm.engine.add(prompt, params)
    llm.engine.step()
    llm.engine.cancel(request)
    many = SamplingParams(max_tokens=9, temperature=1.0, n=3, seed=4)
    assert [o.tokens for o in llm.generate([prompt], many)] == [o.tokens for o in plain.generate([prompt], many)]
    assert store.stats().hits >= 3
    assert all(record.users == 0 for record in store.index.records.values())


@pytest.mark.parametrize(("turns", "reused"), [(0, 0), (1, 40), (2, 120)])
def test_a_history_that_is_seen_at_once_can_be_gone_on_from_where_its_turns_end(turns, reused):
    store, stop = ReuseStore("20MB", **SETTINGS, turns=turns), 2
    model, plain, ids = MODELS["gates, shift 1"](reuse=store), MODELS["gates, shift 1"](), tokens(1, 200).clamp(min=3)
    for each in (model, plain):
        each.generation_config.eos_token_id = each.generation_config.pad_token_id = stop
    ids[0, [39, 79, 119]] = stop  # a system prompt and two turns
    other = torch.cat([ids[:, :120], tokens(1, 30, seed=7).clamp(min=3)], 1)
    other[0, 120] = 3 + (ids[0, 120] == 3)
    options = {"do_sample": False, "max_new_tokens": 6}
    for prompt in (ids, other):
        mask = torch.ones_like(prompt)
        expected = plain.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(model.generate(prompt, attention_mask=mask, **options), expected)
    assert store.stats().reused == reused
