"""Drafts under eviction: with an assistant, prompt lookup or early exit, tokens are those of plain greedy decoding."""

import pytest
import torch
from transformers import DynamicCache

from octavo import KVCache, attach, detach
from octavo.config import UNDO
from octavo.errors import CacheStateError, ConfigError, PromptError
from tiny import tiny_adapter, tiny_model, tokens
from tiny_swift import model_of, pair
from tiny_windows import windowed_model

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def repetitive(length):
    """A text that says things twice, so that prompt lookup finds something to draft."""
    return tokens(1, -(-length // 3)).repeat(1, 3)[:, :length]


def made(kind):
    """A model that evicts within a few tokens, attached."""
    if kind == "gates":
        model = tiny_model()
        return attach(model, tiny_adapter(model, window=9))
    if kind == "chunks, shift 1":
        model = tiny_model("qwen3")
        return attach(model, tiny_adapter(model, window=6, shift=1), chunk=16)
    if kind == "int8":
        model = tiny_model().double()
        return attach(model, tiny_adapter(model, window=9), chunk=16, kv_dtype="int8")
    if kind.startswith("swiftkv"):
        model = model_of()
        return attach(model, pair(model, 1, True, window=9, before=40 * ("hands" in kind)), chunk=16)
    if kind == "windows":
        return attach(windowed_model("gemma2"), chunk=16)
    model = windowed_model("qwen3")
    return attach(model, tiny_adapter(model, window=20), chunk=16)


KINDS = ["gates", "chunks, shift 1", "int8", "swiftkv", "swiftkv that hands on", "windows", "windows and gates"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup_and_early_exit_answer_as_plain_decoding(kind):
    model, ids = made(kind), repetitive(50)
    expected = model.generate(ids, **GREEDY)
    exits = [{"assistant_early_exit": layers} for layers in ((2, 4) if kind.startswith("swiftkv") else (2,))]
    for drafted in ({"prompt_lookup_num_tokens": 5}, {"prompt_lookup_num_tokens": 20}, *exits):
        assert torch.equal(model.generate(ids, **drafted, **GREEDY), expected), drafted


def like(model, noise=0.03):
    """An assistant much like the model, so that some drafts hold and some do not."""
    assistant = tiny_model(seed=3, num_hidden_layers=3)
    with torch.no_grad():
        for ours, theirs in zip(assistant.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + noise * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0)))
    return assistant


@pytest.mark.parametrize("draws", ["attached", "unattached"])
def test_an_assistant_answers_as_plain_decoding(draws):
    model, ids = made("gates"), repetitive(50)
    assistant = like(model)
    if draws == "attached":
        attach(assistant, tiny_adapter(assistant, window=5))
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_drafts_go_past_the_model_s_positions_as_plain_decoding_does():
    model, assistant = (attach(tiny_model(max_position_embeddings=64), chunk=16) for _ in range(2))
    ids, cache = repetitive(50), KVCache(model)
    expected = model.generate(ids, **GREEDY)
    for drafted in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}, {"assistant_early_exit": 2}):
        assert torch.equal(model.generate(ids, **drafted, **GREEDY), expected), drafted
    model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **GREEDY)
    with pytest.raises(PromptError, match="64 positions"):  # a prompt is still one
        model(tokens(1, 5), past_key_values=cache)


def test_a_padding_token_that_is_generated_is_a_token_to_those_who_draft():
    model, ids = made("gates"), repetitive(50)
    assistant = tiny_model()
    attach(assistant, tiny_adapter(assistant, window=9))
    expected = model.generate(ids, **GREEDY)
    for each in (model, assistant):
        each.generation_config.pad_token_id = int(expected[0, 58])
        each.generation_config.update(num_assistant_tokens=5, assistant_confidence_threshold=0)
    mask = torch.ones_like(ids)
    for drafted in ({"assistant_model": assistant}, {"assistant_early_exit": 2}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **drafted, **GREEDY), expected), drafted


def test_an_early_exit_that_fails_leaves_the_model_its_layers(monkeypatch):
    model, ids = made("gates"), repetitive(50)
    expected = model.generate(ids, **GREEDY)
    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(ids, assistant_early_exit=2, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_cache_goes_on_after_drafts_and_is_refused_where_transformers_would_read_twice():
    model, ids = made("gates"), repetitive(50)
    for past in (KVCache(model), DynamicCache(config=model.config)):
        text = model.generate(ids, past_key_values=past, prompt_lookup_num_tokens=6, **GREEDY)
        text = torch.cat([text, ids[:, :7]], 1)
        whole = {**GREEDY, "attention_mask": torch.ones_like(text)}
        expected = model.generate(text, **whole)
        assert torch.equal(model.generate(text, past_key_values=past, **whole), expected)
        with pytest.raises(CacheStateError, match="reads the whole prompt"):
            model.generate(text, past_key_values=past, prompt_lookup_num_tokens=6, **GREEDY)
        assert past.get_seq_length() == expected.shape[1] - 1


def test_memory_is_kept_back_only_where_drafts_are_asked_for():
    model, ids = made("gates"), repetitive(50)
    plain, drafting = KVCache(model), KVCache(model)
    model.generate(ids, past_key_values=plain, **GREEDY)
    model.generate(ids, past_key_values=drafting, prompt_lookup_num_tokens=40, **GREEDY)
    assert (plain.undo, drafting.undo) == (0, 40)
    assert plain.tables.length[list(plain.rows)].sum() < drafting.tables.length[list(drafting.rows)].sum()
    with pytest.raises(CacheStateError, match="undo=0"):
        plain.crop(-10)


def test_a_cache_made_to_undo_is_cropped_exactly_and_joins_one_that_is_not():
    model, ids = tiny_model(), tokens(2, 90)
    attach(model, tiny_adapter(model, window=9), undo=12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = KVCache(model)
        model(ids[:, :60], past_key_values=cache)
        for back in (12, 5, 11):
            for i in range(60 - back, 60):
                cache.crop(-1)
                model(tokens(2, 1, seed=i), past_key_values=cache)  # drafts that do not hold
                model(tokens(2, 3, seed=i), past_key_values=cache)
                cache.crop(-4)
                got = model(ids[:, cache.seen : cache.seen + 1], past_key_values=cache).logits
                torch.testing.assert_close(got[:, 0], expected[:, cache.seen - 1], rtol=0, atol=1e-4)
        rest = model(ids[:, cache.seen :], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 90 - rest.shape[1] :], rtol=0, atol=1e-4)


def test_caches_with_and_without_drafts_run_as_one_batch():
    model, ids = made("gates"), tokens(2, 80)
    caches = [KVCache(model), KVCache(model)]
    caches[1].activate_past_recording()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for i, cache in enumerate(caches):
            model(ids[i : i + 1, :40], past_key_values=cache)
            for at in range(40, 60):
                model(ids[i : i + 1, at : at + 1], past_key_values=cache)
        caches[0].join(caches[1])
        assert caches[0].undo == UNDO
        for _ in range(2):
            got = [model(ids[:, at : at + 1], past_key_values=caches[0]).logits for at in range(60, 80)]
            torch.testing.assert_close(torch.cat(got, 1), expected[:, 60:], rtol=0, atol=1e-4)
            caches[0].crop(-20)


def drafted(model, ids, monkeypatch, length=60, **asked):
    """What `generate` answers when it drafts, and how many tokens each draft had at most."""
    lengths, update = [], type(model).forward

    def forward(self, input_ids=None, **kwargs):
        if self is model and kwargs["past_key_values"].get_seq_length():
            lengths.append(input_ids.shape[1] - 1)
        return update(self, input_ids=input_ids, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", forward)
        answer = model.generate(ids, **asked, **{**GREEDY, "max_new_tokens": length})
    return answer, max(lengths)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("draws", ["attached", "unattached", "attached, undo 2", "early exit", "lookup"])
def test_drafts_are_no_longer_than_what_can_be_taken_back(draws, schedule, monkeypatch):
    model, ids = tiny_model(), repetitive(50)
    attach(model, tiny_adapter(model, window=9), undo=4)
    expected = model.generate(ids, **{**GREEDY, "max_new_tokens": 60})
    assistant = like(model, 0.01)
    for each in (model, assistant):
        each.generation_config.update(num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0)
    if draws.startswith("attached"):
        attach(assistant, tiny_adapter(assistant, window=5), undo=2 if "2" in draws else None)
    asked = {"early exit": {"assistant_early_exit": 2}, "lookup": {"prompt_lookup_num_tokens": 10}}
    answer, longest = drafted(model, ids, monkeypatch, **asked.get(draws, {"assistant_model": assistant}))
    assert torch.equal(answer, expected)
    assert longest == (2 if "2" in draws else 4)


def test_a_schedule_stops_at_what_caches_keep_for_drafts(monkeypatch):
    model, ids = made("gates"), repetitive(50)
    assistant = tiny_model()
    attach(assistant, tiny_adapter(assistant, window=9))
    assistant.generation_config.update(
        num_assistant_tokens=UNDO - 1, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0
    )
    expected = model.generate(ids, **{**GREEDY, "max_new_tokens": 100})
    answer, longest = drafted(model, ids, monkeypatch, 100, assistant_model=assistant)  # all drafts hold
    assert torch.equal(answer, expected)
    assert longest == UNDO
    assert UNDO <= assistant.generation_config.num_assistant_tokens <= UNDO + 2  # where it is kept for the next call


def test_a_model_that_can_take_nothing_back_refuses_drafts_at_once():
    model, ids = tiny_model(), repetitive(50)
    attach(model, tiny_adapter(model, window=9), undo=0)
    with pytest.raises(CacheStateError, match="undo=0 can take no draft back"):
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    attach(model, undo=0)  # nothing is evicted, so all can be
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize("undo", [-1, 2.5, 10**9, True, "many"])
def test_an_impossible_undo_is_refused(undo):
    with pytest.raises(ConfigError, match="undo"):
        attach(tiny_model(), undo=undo)


def test_detach_gives_generate_back():
    model = made("gates")
    detach(model)
    assert not {"generate", "_get_candidate_generator"} & set(model.__dict__)
