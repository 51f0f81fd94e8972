"""Exercises: every answer stands in, or follows from, what was shown; lengths are exact; any text and tokenizer do."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.retrofit.data import Source, encode
from octavo.retrofit.exercises import exercise_sequence, session
from octavo.retrofit.exercises.copying import edit, go_on, quote, repeat
from octavo.retrofit.exercises.item import looks_like_code, sentences
from octavo.retrofit.exercises.lookup import listing, records, table
from octavo.retrofit.exercises.reader import Reader
from octavo.retrofit.exercises.scattered import facts, several, variables
from octavo.retrofit.packing import Packer
from octavo.retrofit.settings import RetrofitSettings, SwiftSettings, exercises_for

PROSE = " ".join(
    f"On day {i} the {a} of {b} was seen near the {c}, and {i * 7} people spoke of it. Nobody knew why it came."
    for i in range(60)
    for a, b, c in [("ship", "Bergen", "harbour"), ("cart", "Lyon", "mill")]
)
CODE = "\n".join(
    f"def step_{i}(value, other):\n    total = value * {i} + other\n    return total - {i}\n" for i in range(80)
)
WITHOUT_SPACES = "春天来了，花开了。人们都很高兴！你知道为什么吗？" * 60
TEXTS = {"prose": PROSE, "code": CODE, "no spaces": WITHOUT_SPACES, "one word": "word " * 900, "bytes": "\ufffd" * 900}
seeds = st.integers(0, 2**32)


def source_of(tokenizer, text):
    ids = np.array(encode(tokenizer, text), dtype=np.uint16)
    return Source("text", np.resize(ids, max(len(ids), 3000)), None, 1.0)


@pytest.fixture(scope="module")
def readers(tokenizer):
    return {name: Reader(tokenizer, [source_of(tokenizer, text)]) for name, text in TEXTS.items()}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", [True, False])
def test_sequences_have_the_length_asked_for_on_any_text(tokenizer, text, template, monkeypatch):
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    sources = [source_of(tokenizer, TEXTS[text])]
    for length in (1, 16, 64, 299, 301, 1000, 3000):
        ids = exercise_sequence(tokenizer, sources, np.random.default_rng(length), length)
        assert ids.shape == (length,)
        assert np.array_equal(ids, exercise_sequence(tokenizer, sources, np.random.default_rng(length), length))


def test_what_is_asked_for_stands_before_the_question(tokenizer, monkeypatch):
    monkeypatch.setattr(session, "KINDS", {repeat: 1.0})
    sources, seen = [source_of(tokenizer, PROSE)], 0
    for seed in range(30):
        text = tokenizer.decode(exercise_sequence(tokenizer, sources, np.random.default_rng(seed), 2500))
        for part in text.split("<|im_start|>assistant\n")[1:]:
            answer = part.split("<|im_end|>")[0].removeprefix("Certainly. ").split("\n\n")[-1]
            assert answer in text[: text.index(part)]
            seen += 1
    assert seen > 10


def test_half_of_the_sessions_are_chats(tokenizer):
    sources, chats = [source_of(tokenizer, PROSE)], 0
    for seed in range(60):
        ids = exercise_sequence(tokenizer, sources, np.random.default_rng(seed), 800)
        chats += "<|im_start|>user" in tokenizer.decode(ids)
    assert 15 < chats < 50


@given(seeds, st.sampled_from(["prose", "code"]))
@settings(max_examples=40, deadline=None)
def test_copies_are_copies(readers, seed, name):
    rng = np.random.default_rng(seed)
    item = repeat(readers[name], rng)
    assert all(turn.answer.endswith(item.bodies[0]) for turn in item.turns)
    item = quote(readers[name], rng)
    assert all(turn.answer.strip('"') in item.bodies[0] or turn.answer in item.bodies[0] for turn in item.turns)
    item = go_on(readers[name], rng)
    assert item.bodies[0].endswith(item.turns[0].answer)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_edits_change_one_thing(readers, seed):
    item = edit(readers["code"], np.random.default_rng(seed))
    before, after = item.bodies[0].split("\n"), item.turns[0].answer.split("\n")
    if len(after) == len(before) - 1:
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        assert before[:at] + before[at + 1 :] == after
        assert before[at].strip() in item.turns[0].question
        return
    words = [
        (a, b)
        for a, b in zip(re.findall(r"\w+|\W", "\n".join(before)), re.findall(r"\w+|\W", "\n".join(after)), strict=True)
    ]
    changed = {pair for pair in words if pair[0] != pair[1]}
    ((old, new),) = changed
    assert old in item.turns[0].question
    assert new in item.turns[0].question
    assert sum(a == old for a, _ in words) == sum(b == new for _, b in words) > 1


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_answers_stand_in_their_row(readers, seed):
    item = table(readers["prose"], np.random.default_rng(seed))
    for turn in item.turns:
        value = turn.answer.rstrip(".").split(" is ")[-1]
        rows = [line for line in item.bodies[0].split("\n") if value in line]
        assert any(word in turn.question for line in rows for word in re.findall(r"\w+", line)[:1])
    item = records(readers["prose"], np.random.default_rng(seed))
    data = json.loads(item.bodies[0].removeprefix("```json\n").removesuffix("\n```"))
    flat = json.dumps(data)
    for turn in item.turns:
        values = (
            json.loads(turn.answer).values()
            if turn.answer[0] == "{"
            else [turn.answer.removesuffix(".").split(" is ")[-1]]
        )
        assert all(value in flat for value in values)
    item = listing(readers["prose"], np.random.default_rng(seed))
    assert all(turn.answer in item.bodies[0] for turn in item.turns)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_chains_lead_to_their_number(readers, seed):
    item = variables(readers["prose"], np.random.default_rng(seed))
    values = {}
    for body in item.bodies:
        name, given_ = re.fullmatch(r"(?:VAR |let |Set )?(\w+) (?:=|to) (\w+)[;.]?", body).groups()
        values[name] = values.get(given_, given_)
    for turn in item.turns:
        asked = [name for name in values if re.search(rf"\b{name}\b", turn.question)]
        if asked:
            assert values[asked[0]] in turn.answer
        else:
            wanted = [name for name, value in values.items() if value in turn.question]
            assert sorted(turn.answer.split(", ")) == sorted(wanted)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_facts_are_stated(readers, seed):
    for maker in (facts, several):
        item = maker(readers["prose"], np.random.default_rng(seed))
        stated = " ".join(item.bodies)
        for turn in item.turns:
            assert all(word in stated for word in re.findall(r"\d{3,}", turn.answer))


def test_sentences_and_code_are_told_apart():
    assert sentences('He came. "Why?" she said. 好。再见') == ["He came.", '"Why?"', "she said.", "好。", "再见"]
    assert looks_like_code(CODE)
    assert not looks_like_code(PROSE.replace(". ", ".\n"))


def test_rows_are_packed_with_exercises(tokenizer, monkeypatch):
    monkeypatch.setattr(session, "KINDS", {repeat: 1.0})
    packer = Packer([source_of(tokenizer, PROSE)], tokenizer, 0.0, 1024, exercises=1.0)
    rows = packer.rows(np.random.default_rng(0), 4)
    assert rows.tokens.shape == (4, 1024)
    assert (rows.document >= 0).float().mean() > 0.95
    plain = Packer([source_of(tokenizer, PROSE)], tokenizer, 0.0, 1024)
    assert not np.array_equal(plain.rows(np.random.default_rng(0), 4).tokens, rows.tokens)


def test_shares_are_checked():
    with pytest.raises(ConfigError, match="exceed 1 together"):
        RetrofitSettings(swiftkv=SwiftSettings(2), recall=0.7, exercises=0.4)
    with pytest.raises(ConfigError, match="exercises must lie"):
        RetrofitSettings(swiftkv=SwiftSettings(2), exercises=-0.1)
    assert exercises_for(0.1, None) == 0.4
    assert exercises_for(0.8, None) == pytest.approx(0.2)
    assert exercises_for(0.8, 0.0) == 0.0
