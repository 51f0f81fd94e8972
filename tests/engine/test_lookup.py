"""Prompt lookup in the engine: drafts from a request's own text change how many steps it takes and nothing else."""

import pytest
import torch

import octavo.engine.engine
from octavo import LLM, SamplingParams, attach
from octavo.attachment import require_attachment
from octavo.engine import Engine
from octavo.engine.lookup import looked_up
from octavo.errors import ConfigError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_decoders import tiny_decoder
from tiny_windows import windowed_model

pytestmark = pytest.mark.usefixtures("one_thread")


def repetitive(length, seed=1):
    return tokens(1, -(-length // 3), seed).repeat(1, 3)[0, :length].tolist()


def answered(model, requests, **options):
    """(tokens and reasons of all requests, steps that decoded)."""
    engine = Engine(model, max_batch=2, step_tokens=40, **options)
    made = [engine.add(prompt, params) for prompt, params in requests]
    steps, decode = [], engine._decode
    engine._decode = lambda: (steps.append(len(engine.runner.running)), decode())
    while engine.unfinished:
        engine.step()
    assert require_attachment(model)._memory.sequences == 0
    return [(r.output.tokens, r.output.finish_reason, len(r.output.logprobs)) for r in made], len(steps)


@pytest.mark.parametrize("kind", ["gates", "shift 1", "windows", "dense"])
def test_answers_are_those_without_drafts_in_fewer_steps(kind, monkeypatch):
    if kind == "windows":
        model = attach(windowed_model("qwen3"), chunk=16)
    else:
        model = tiny_model()
        gates = None if kind == "dense" else tiny_adapter(model, window=7, shift=int(kind == "shift 1"))
        attach(model, gates, chunk=16)
    greedy = {"temperature": 0.0, "ignore_eos": True}
    requests = [
        (repetitive(50, 3), SamplingParams(**greedy, max_tokens=70)),
        (repetitive(40, 2), SamplingParams(**greedy, max_tokens=7, logprobs=1)),
        (repetitive(45, 3), SamplingParams(**greedy, max_tokens=12, repetition_penalty=1.1)),
        (repetitive(30, 4), SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True)),
    ]
    expected, plain = answered(model, requests)
    assert answered(model, requests, prompt_lookup=5)[0] == expected

    def knows(tokens, most):
        """Drafts what will be answered, now and then with an error at its end."""
        for (prompt, _), (answer, *_) in zip(requests, expected, strict=True):
            if tokens[: len(prompt)] == prompt:
                at = len(tokens) - len(prompt)
                draft = answer[at : at + most]
        return [*draft[:-1], (draft[-1] + at % 2) % 97]

    monkeypatch.setattr(octavo.engine.engine, "looked_up", knows)
    got, fewer = answered(model, requests, prompt_lookup=5)
    assert got == expected
    assert fewer < plain - 20


def test_a_draft_ends_before_what_ends_the_request():
    model = attach(tiny_model())
    prompt = repetitive(50)
    (whole,), _ = answered(model, [(prompt, SamplingParams(temperature=0.0, max_tokens=40))])
    end = whole[0][20]
    params = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=[end])
    expected, _ = answered(model, [(prompt, params)])
    assert expected[0][1] == "stop"
    assert answered(model, [(prompt, params)], prompt_lookup=15)[0] == expected


def test_what_followed_the_last_time_is_drafted():
    assert looked_up([1, 2, 3, 4, 9, 1, 2, 3], 3) == [4, 9, 1]
    assert looked_up([7, 2, 3, 4, 1, 2, 3, 5, 8, 2, 3], 2) == [5, 8]
    assert looked_up([1, 2, 3, 4], 3) == []
    assert looked_up([5], 3) == []
    assert looked_up([1, 1, 1], 4) == [1]


@pytest.mark.parametrize(("lookup", "undo"), [(-1, None), (True, None), (2.5, None), (8, 4)])
def test_an_impossible_lookup_is_refused(lookup, undo):
    model = attach(tiny_model(), undo=undo)
    with pytest.raises(ConfigError, match="prompt_lookup"):
        LLM(model, prompt_lookup=lookup)
    assert torch.is_grad_enabled()


def test_a_model_whose_states_cannot_go_back_is_refused_before_it_runs():
    model = attach(tiny_decoder("lfm2"))
    with pytest.raises(ConfigError, match="states of its layers cannot go back"):
        Engine(model, prompt_lookup=3)
    assert Engine(model).runner.drafted == 0


def test_a_draft_that_has_no_room_costs_no_token(monkeypatch):
    request, got = (repetitive(50), SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)), []
    for lookup in (0, 15):
        monkeypatch.setattr(
            octavo.engine.engine, "looked_up", lambda tokens, most: got[0][0][len(tokens) - 50 :][:most]
        )
        ((tokens_read, reason, _),), _ = answered(
            attach(tiny_model(), chunk=16, budget=330_000, page_size=4), [request], prompt_lookup=lookup
        )
        assert reason == "error"  # in the end it does not fit
        got.append((tokens_read, reason))
    assert len(got[0][0]) > 50
    assert got[0] == got[1]
