"""Text that the model samples for its training: how much, kept and gone on with, and what is said where it fails."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, RetrofitError
from octavo.retrofit import sampling
from octavo.retrofit.openings import made_openings
from octavo.retrofit.sampling import RECORD, TEXT, SamplingSettings, amount_for, batch_for, load_sampled, sample
from octavo.retrofit.settings import GateSettings, RetrofitSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = SamplingSettings(tokens=70, seed=1, batch=2, max_new_tokens=7)


def stop_after(count):
    def on_tokens(tokens):
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt

    return on_tokens


def test_both_kinds_are_sampled_kept_and_loaded(student, tokenizer, tmp_path):
    seen = []
    sample(student, tokenizer, SETTINGS, tmp_path, on_tokens=seen.append)
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] >= SETTINGS.tokens > seen[-2]
    lines = [json.loads(line) for line in (tmp_path / TEXT).read_text(encoding="utf-8").splitlines()]
    sources, card = load_sampled(tokenizer, SETTINGS, tmp_path, 20)
    assert [source.name for source in sources] == ["sampled completions", "sampled chats"]
    assert [source.share for source in sources] == [0.5, 0.5]
    assert sources[0].starts is None
    assert card["chats"] == len(sources[1].starts) == sum("messages" in line for line in lines) > 0
    assert card["completions"] == sum("text" in line for line in lines) > 0
    assert (card["tokens"], card["seed"], card["notes"]) == (seen[-1], 1, [])
    assert card["prompts"] == 2 * (len(seen) - 1)
    assert len(sources[0].draw(np.random.default_rng(0), 20)) == 20


def test_an_interrupted_sampling_goes_on_to_the_same_text(student, tokenizer, tmp_path):
    sample(student, tokenizer, SETTINGS, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        sample(student, tokenizer, SETTINGS, tmp_path / "cut", on_tokens=stop_after(2))
    with (tmp_path / "cut" / TEXT).open("a") as f:
        f.write('{"text": "written, not yet in the record"}\n{"text": "ha')
    asked = []
    sample(student, tokenizer, SETTINGS, tmp_path / "cut", resume=True, on_tokens=asked.append)
    assert asked[0] > 0, "what there was counts"
    for name in (TEXT, RECORD):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    before = (tmp_path / "whole" / TEXT).read_bytes()
    sample(student, tokenizer, SETTINGS, tmp_path / "whole", on_tokens=asked.append)
    assert (tmp_path / "whole" / TEXT).read_bytes() == before, "nothing is sampled again"


def test_a_longer_run_adds_to_a_shorter_one(student, tokenizer, tmp_path):
    sample(student, tokenizer, SETTINGS, tmp_path)
    few = load_sampled(tokenizer, SETTINGS, tmp_path, 20)
    before = (tmp_path / TEXT).read_bytes()
    sample(student, tokenizer, replace(SETTINGS, tokens=110), tmp_path)
    assert (tmp_path / TEXT).read_bytes().startswith(before)
    again = load_sampled(tokenizer, SETTINGS, tmp_path, 20)
    assert few[1] == again[1]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(few[0], again[0], strict=True))


def test_another_seed_is_refused_on_resume_and_replaces_otherwise(student, tokenizer, tmp_path):
    sample(student, tokenizer, SETTINGS, tmp_path)
    other = replace(SETTINGS, seed=2)
    with pytest.raises(RetrofitError, match="another seed"):
        sample(student, tokenizer, other, tmp_path, resume=True)
    before = (tmp_path / TEXT).read_bytes()
    sample(student, tokenizer, other, tmp_path)
    assert (tmp_path / TEXT).read_bytes() != before
    (tmp_path / TEXT).write_text("")
    with pytest.raises(RetrofitError, match="lacks documents"):
        sample(student, tokenizer, other, tmp_path, resume=True)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(RetrofitError, match=r"cannot read .*sampled\.json"):
        sample(student, tokenizer, other, tmp_path, resume=True)


def test_without_a_chat_template_there_are_completions_only(student, tokenizer, tmp_path):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = plain.pad_token = None
    sample(student, plain, SETTINGS, tmp_path)
    sources, card = load_sampled(plain, SETTINGS, tmp_path, 20)
    assert [(source.name, source.share) for source in sources] == [("sampled completions", 1.0)]
    assert card["notes"] == ["the tokenizer has no chat template: completions only"]


def test_a_model_that_ends_at_once_is_an_error_that_says_what_to_do(student, tokenizer, tmp_path):
    class Head(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.full((*hidden.shape[:-1], 49152), -100.0)
            logits[..., tokenizer.eos_token_id] = 100.0
            return logits

    student.lm_head = Head()
    with pytest.raises(RetrofitError, match=r"ends its text at once.*after 4 prompts.*--data FILE --no-sampled"):
        sample(student, tokenizer, SETTINGS, tmp_path)


def test_a_kind_in_which_the_model_says_nothing_is_left_out_and_noted(student, tokenizer, tmp_path, monkeypatch):
    silent = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": ""}]
    monkeypatch.setattr(
        sampling, "sampled_chats", lambda model, tokenizer, prompts, *rest, seed: [silent] * len(prompts)
    )
    sample(student, tokenizer, SETTINGS, tmp_path)
    sources, card = load_sampled(tokenizer, SETTINGS, tmp_path, 20)
    assert [source.name for source in sources] == ["sampled completions"]
    assert card["notes"] == ["chats: the model said next to nothing, left out"]


def test_amounts_follow_the_run():
    run = RetrofitSettings(GateSettings(window=8), steps=100, batch=4, length=1000)
    assert amount_for(run, "cuda") == 100 * 4 * 1000 // sampling.READ
    assert amount_for(replace(run, steps=1), "cuda") == 4000
    assert amount_for(replace(run, steps=10**6), "cuda") == sampling.MOST
    assert amount_for(replace(run, steps=10**6), "cpu") == sampling.MOST_ON_CPU
    for wrong in ({"tokens": 0}, {"batch": 0}, {"max_new_tokens": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            replace(SETTINGS, **wrong)


def test_few_tokens_need_few_answers_at_once(student):
    assert batch_for(student, 10**6, 256) == 64
    assert batch_for(student, 1200, 256) == 3


def test_openings_are_many_and_made_from_a_seed():
    made = made_openings(400, 3)
    assert made == made_openings(400, 3) != made_openings(400, 4)
    assert all(opening.strip() for opening in made)
    assert len(set(made)) > 250
    assert not any("{name}" in opening for opening in made)
    with pytest.raises(ConfigError, match="at least 1"):
        made_openings(0)
