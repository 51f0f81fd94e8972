"""Conversations: the cache lives on, tokens are never rendered twice, and streams are what `generate` says."""

from itertools import chain

import pytest
import torch

from octavo import attach, detach
from octavo.cli.chat import Conversation, Sampling, choose
from octavo.errors import CacheBudgetError, CacheStateError, ConfigError, PromptError
from tiny import tiny_adapter


def ids_of(tokenizer, chat):
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("attached", [False, True])
def test_turns_are_what_a_fresh_generate_would_answer(smollm, attached):
    model, tokenizer = smollm
    if attached:
        attach(model)
    try:
        conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=12))
        chat = []
        for question in ("Name a colour.", "And another one?", "Thanks."):
            answer = "".join(conversation.ask(question))
            chat.append({"role": "user", "content": question})
            ids = ids_of(tokenizer, chat)
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
            assert answer == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
            chat.append({"role": "assistant", "content": answer})
            assert conversation.cache.get_seq_length() >= len(conversation.ids) - 1
        fresh = ids_of(tokenizer, chat[:-1])[0].tolist()
        assert conversation.ids[: len(fresh)] == fresh, "the turns grew into the rendered chat"
    finally:
        if attached:
            detach(model)


def test_prefill_reports_its_progress_and_only_new_tokens(smollm):
    model, tokenizer = smollm
    attach(model, chunk=8)
    try:
        conversation, seen = Conversation(model, tokenizer, Sampling(max_new_tokens=3)), []
        list(conversation.ask("One two three four five six seven.", lambda *p: seen.append(p)))
        total = seen[-1][1]
        assert seen == [(min(8 * (i + 1), total), total) for i in range(len(seen))]
        seen.clear()
        list(conversation.ask("Eight.", lambda *p: seen.append(p)))
        assert seen[-1][1] < total
    finally:
        detach(model)


def test_raw_text_is_continued(smollm):
    model, tokenizer = smollm
    got = "".join(Conversation(model, tokenizer, Sampling(max_new_tokens=6)).complete("One, two, three,"))
    ids = tokenizer("One, two, three,", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert got == tokenizer.decode(expected[0, ids.shape[1] :])


def test_bad_turns_are_refused_and_the_conversation_goes_on(smollm):
    model, tokenizer = smollm
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=4))
    first = "".join(conversation.ask("Hello."))
    before = list(conversation.ids)
    with pytest.raises(PromptError, match="empty"):
        conversation.ask(" \n")
    with pytest.raises(PromptError, match="8,192 positions"):
        conversation.ask("word " * 9000)
    with pytest.raises(PromptError, match="empty"):
        conversation.complete("")
    for feed in (conversation.ask, conversation.complete):
        with pytest.raises(PromptError, match="not Unicode text at character 4"):
            feed("caf\udce9")
    assert conversation.ids == before
    assert first
    assert "".join(conversation.ask("Again."))


LAST = "<user>{{ messages[-1]['content'] }}<answer>"  # earlier turns are left out
NONE = "<user>{{ messages[-1]['role'] }}<answer>"


@pytest.mark.parametrize("template", [LAST, NONE])
def test_a_template_that_leaves_turns_out_is_refused_and_the_conversation_stays(smollm, monkeypatch, template):
    model, tokenizer = smollm
    monkeypatch.setattr(tokenizer, "chat_template", template)
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=4))
    if template is LAST:
        assert "".join(conversation.ask("Hello."))  # nothing is earlier than the first turn
    before = list(conversation.ids)
    with pytest.raises(PromptError, match="leaves turns out"):
        conversation.ask("Again.")
    assert conversation.ids == before


def test_sampling_follows_its_seed_and_its_mass():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])

    def draw(sampling: Sampling) -> list[int]:
        g = torch.Generator().manual_seed(sampling.seed)
        return [int(choose(logits, sampling, g)) for _ in range(200)]

    assert set(draw(Sampling())) == {3}
    assert draw(Sampling(temperature=1.0, seed=1)) == draw(Sampling(temperature=1.0, seed=1))
    assert set(draw(Sampling(temperature=1.0))) == {0, 1, 2, 3}
    assert set(draw(Sampling(temperature=1.0, top_p=0.7))) == {2, 3}
    assert set(draw(Sampling(temperature=1.0, top_p=0.1))) == {3}
    shares = [draw(Sampling(temperature=1.0)).count(i) / 200 for i in range(4)]
    assert shares[3] == pytest.approx(logits.softmax(0)[3].item(), abs=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": float("nan")},
        {"seed": 2**64},
        {"seed": -1},
    ],
)
def test_impossible_sampling_is_refused(change):
    with pytest.raises(ConfigError):
        Sampling(**change)


def test_pieces_are_whole_characters(smollm):
    model, tokenizer = smollm
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=24))
    logits = iter(tokenizer("naïve 中文 – done", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    script = [torch.nn.functional.one_hot(torch.tensor(i), 49152).float() for i in logits]

    class Scripted:
        generation_config = model.generation_config
        config = model.config
        device = model.device
        steps = iter(script[1:])

        def __call__(self, **kwargs):
            return type("Out", (), {"logits": next(self.steps)[None, None]})()

    conversation.model = Scripted()
    pieces = list(conversation._decode(script[0]))
    assert "".join(pieces) == "naïve 中文 – done"
    assert "\ufffd" not in set(chain.from_iterable(pieces))


def failing(done, total):
    """A callback that fails where a cache may, between two chunks."""
    if done >= min(16, total):
        raise CacheBudgetError("no more")


@pytest.mark.parametrize("earlier", [[], ["Name a colour."]])
@pytest.mark.parametrize("attached", [False, True])
def test_a_turn_that_fails_halfway_is_taken_back(smollm, attached, earlier):
    model, tokenizer = smollm
    if attached:
        attach(model, chunk=8)
    try:
        conversation, untouched = (Conversation(model, tokenizer, Sampling(max_new_tokens=5)) for _ in range(2))
        for turn in earlier:
            assert "".join(conversation.ask(turn)) == "".join(untouched.ask(turn))
        with pytest.raises(CacheBudgetError):
            conversation.ask("One two three four five six seven eight nine ten eleven twelve.", failing)
        assert conversation.ids == untouched.ids
        assert conversation.cache.get_seq_length() == untouched.cache.get_seq_length()
        assert "".join(conversation.ask("And another one?")) == "".join(untouched.ask("And another one?"))
    finally:
        if attached:
            detach(model)


def test_a_turn_over_the_budget_leaves_room_for_a_shorter_one(smollm):
    model, tokenizer = smollm
    attach(model, chunk=16, budget=12_000_000)
    try:
        conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=3))
        list(conversation.ask("Hello."))
        before = list(conversation.ids)
        with pytest.raises(CacheBudgetError):
            conversation.ask("word " * 400)
        assert conversation.ids == before
        assert "".join(conversation.ask("Again."))
    finally:
        detach(model)


def test_a_conversation_that_cannot_be_taken_back_says_so(smollm):
    model, tokenizer = smollm
    attach(model, tiny_adapter(model, window=4), chunk=8)
    try:
        conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=3))
        list(conversation.ask("Hello."))
        with pytest.raises(CacheBudgetError):
            conversation.ask("One two three four five six seven eight nine ten eleven twelve.", failing)
        for feed in (conversation.ask, conversation.complete):
            with pytest.raises(CacheStateError, match="start a new conversation"):
                feed("Again.")
    finally:
        detach(model)
