"""Agreement of answers: numbers are read right, answers are `generate`'s, tokens are compared one by one."""

import json
from decimal import Decimal

import pytest
import torch

from octavo import attach
from octavo.attachment import KVCache, attachment_of, require_attachment
from octavo.attachment.supported import fingerprint
from octavo.dms import Adapter
from octavo.errors import AdapterMismatchError, ConfigError, TextFileError
from octavo.retrofit.agreement import AgreementSettings, Question, agreement, answered, last_number, read_questions
from octavo.retrofit.entries import together
from octavo.swiftkv import SwiftKVAdapter, initial
from tiny import tiny_adapter, tiny_model

SETTINGS = AgreementSettings(cases=7, max_new_tokens=12, batch=3)


class Letters:
    """A tokenizer of single characters; answers read as the numbers of their tokens."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [2 + ord(c) % 95 for c in text]}

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


@pytest.fixture
def model():
    return tiny_model(seed=3)


@pytest.fixture
def questions():
    return [Question("a long question " * n, "#### 5") for n in (3, 1, 5, 2, 8, 1, 4, 9)]


def swiftkv_adapter(model, kv_layers=1, group=1, noise=0.05):
    swiftkv = initial(model, kv_layers, group)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (swiftkv.q, swiftkv.kv):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return SwiftKVAdapter("swiftkv", swiftkv, fingerprint(model))


def gates_on(adapter, model):
    gates = tiny_adapter(model, window=16, rate=0.6)
    return Adapter("gates", gates.gates, gates.fingerprint, 2.0, made_on=adapter.transform.fingerprint())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes $1,234.50 a day.", "1234.5"),
        ("so 16 - 3 - 4 = 9.", "9"),
        ("#### 70000", "70000"),
        ("between 5-10", "10"),
        ("it is -7", "-7"),
        ("1,000, no: .5", "0.5"),
        ("18.00", "18"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_is_found(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_questions_are_read_and_bad_files_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) + "\n" for i in range(5)))
    assert read_questions(path, 3) == [Question(f"q{i}", f"#### {i}") for i in range(3)]
    assert len(read_questions(path)) == 5
    path.write_text(
        '{"question": "a\u2028b", "answer": "1"}\n\n  \n{"question": "c", "answer": "2"}\n', encoding="utf-8"
    )
    assert read_questions(path, 2) == [Question("a\u2028b", "1"), Question("c", "2")]
    with pytest.raises(TextFileError, match="cannot read"):
        read_questions(tmp_path / "absent.jsonl")
    for text in ("", "\n", "[1]\n", '{"question": "q"}\n', "no json\n"):
        path.write_text(text)
        with pytest.raises(TextFileError, match="holds no"):
            read_questions(path)


def test_the_base_agrees_with_itself_and_the_model_is_left_alone(model, questions):
    rows = agreement(model, Letters(), questions, [], SETTINGS)
    assert [(r.name, r.same, r.agreed) for r in rows] == [("dense", 1.0, 1.0)]
    assert attachment_of(model) is None
    attach(model, tiny_adapter(model), chunk=64)
    agreement(model, Letters(), questions, [], SETTINGS)
    assert require_attachment(model).settings.chunk == 64
    assert require_attachment(model).adapter is not None


@pytest.mark.parametrize("kind", ["swiftkv", "both", "gates"])
def test_answers_in_padded_batches_are_generate_s_one_by_one(model, questions, kind):
    swiftkv = swiftkv_adapter(model)
    adapters = {"swiftkv": [swiftkv], "both": [swiftkv, gates_on(swiftkv, model)], "gates": [tiny_adapter(model)]}[kind]
    attach(model, adapters)
    prompts = [Letters()(q.question)["input_ids"] for q in questions]
    expected = []
    for ids in prompts:
        full = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        expected.append(full[0, len(ids) :].tolist())
    assert answered(model, prompts, SETTINGS) == expected


def test_answers_stop_at_the_stop_token(model, questions):
    attach(model)
    prompts = [Letters()(q.question)["input_ids"] for q in questions]
    free = answered(model, prompts, SETTINGS)
    model.generation_config.eos_token_id = [free[2][3], free[5][0]]
    stops = set(model.generation_config.eos_token_id)
    for whole, cut in zip(free, answered(model, prompts, SETTINGS), strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        assert cut == whole[:end]


@pytest.mark.parametrize("kind", ["swiftkv", "both", "gates"])
def test_shares_are_those_counted_by_hand(model, questions, kind):
    swiftkv = swiftkv_adapter(model)
    entry = {
        "swiftkv": swiftkv,
        "both": (swiftkv, gates_on(swiftkv, model)),
        "gates": tiny_adapter(model, window=8, rate=0.9),
    }[kind]
    adapters = list(entry) if isinstance(entry, tuple) else [entry]
    tokenizer, asked = Letters(), questions[: SETTINGS.cases]
    prompts = [tokenizer(f"User: {q.question}\nAssistant:")["input_ids"] for q in asked]
    base = answered(attach(model), prompts, SETTINGS)
    asked[1] = Question(asked[1].question, f"is {base[1][-1]}")  # the base is right once
    dense, row = agreement(model, tokenizer, [*asked, questions[-1]], [entry], SETTINGS)
    gold = [base[1][-1] if i == 1 else 5 for i in range(7)]
    assert dense.right == pytest.approx(sum(a[-1] == b for a, b in zip(base, gold, strict=True)) / 7)
    attach(model, adapters)
    ours = answered(model, prompts, SETTINGS)
    assert row.same == pytest.approx(sum(a[-1] == b[-1] for a, b in zip(ours, base, strict=True)) / 7)
    hits = 0
    for ids, answer in zip(prompts, base, strict=True):
        cache, feed = KVCache(model), torch.tensor([ids])
        for token in answer:  # the base's tokens through the real cache, one at a time
            with torch.no_grad():
                hits += int(model(feed, past_key_values=cache).logits[0, -1].argmax() == token)
            feed = torch.tensor([[token]])
    assert row.agreed == pytest.approx(hits / sum(map(len, base)))
    assert row.agreed < 1
    assert row.name == " + ".join(a.name for a in adapters)


def test_what_does_not_fit_is_refused(model, questions):
    with pytest.raises(ConfigError, match="at least one question"):
        agreement(model, Letters(), [], [], SETTINGS)
    with pytest.raises(AdapterMismatchError):
        agreement(model, Letters(), questions, [tiny_adapter(tiny_model(num_hidden_layers=2))], SETTINGS)
    assert attachment_of(model) is None
    for change in ({"cases": 0}, {"batch": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError):
            AgreementSettings(**change)


def test_adapters_are_put_together(model):
    swiftkv = swiftkv_adapter(model)
    gates = gates_on(swiftkv, model)
    assert together([gates, swiftkv]) == (swiftkv, gates)
    assert together([swiftkv]) is swiftkv
    assert together([gates]) is gates
    for wrong in ([], [gates, gates], [swiftkv, swiftkv]):
        with pytest.raises(ConfigError, match="go together"):
            together(wrong)


class Words(Letters):
    """Answers with one number where the first token is even, else without."""

    def decode(self, ids, **options):
        return str(ids[-1]) if ids[0] % 2 == 0 else "no number"


@pytest.mark.parametrize(("tokenizer", "numbers"), [(Words(), 1), (Letters(), 2), (None, 0)])
def test_only_questions_that_the_base_answers_with_a_number_count(model, questions, monkeypatch, tokenizer, numbers):
    base, other = [[2, 5], [3, 5]], [[2, 6], [3, 5]]
    given = iter([base, other])
    monkeypatch.setattr("octavo.retrofit.agreement.answered", lambda *_: next(given))
    if tokenizer is None:
        tokenizer = Words()
        tokenizer.decode = lambda ids, **options: "none"
    dense, row = agreement(model, tokenizer, questions[:2], [tiny_adapter(model)], SETTINGS)
    assert dense.same == (1 if numbers else 0)
    assert row.same == {0: 0, 1: 0, 2: 0.5}[numbers]
