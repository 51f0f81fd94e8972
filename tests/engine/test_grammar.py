"""Constraints: every output that they let through is one that was asked for."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from octavo.engine.grammar import Grammars, allowed, words
from octavo.engine.sampling import Sampler, SamplingParams
from octavo.errors import ConfigError

V = 49_152
END = 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from octavo.models import default_model
    from octavo.models.gguf import unpacked_gguf

    return AutoTokenizer.from_pretrained(unpacked_gguf(Path(default_model())))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    pytest.importorskip("xgrammar", exc_type=ImportError, reason="needs xgrammar")
    return Grammars(tokenizer, V)


def bits_of(constraint):
    bits = torch.empty(words(V), dtype=torch.int32)
    constraint.fill(bits)
    return [t for t in range(V) if bits[t // 32].item() >> (t % 32) & 1]


def spoken(tokenizer, constraints, seed=0, most=80):
    """What random logits say under constraints, all in one batch with a free row between."""
    n = len(constraints)
    sampler = Sampler(2 * n, V, "cpu", eos=(END,))
    for slot in range(2 * n):
        sampler.add(slot, SamplingParams(seed=slot, logprobs=0), [1], seed + slot)
    outputs, dice = [[] for _ in range(n)], torch.Generator().manual_seed(seed)
    for step in range(most):
        live = {2 * i: c for i, c in enumerate(constraints) if not c.terminated}
        if not live:
            break
        logits = torch.randn(2 * n, V, generator=dice)
        sampled = sampler.sample(logits, torch.arange(2 * n), torch.full((2 * n,), 1 + step), allowed(live, "cpu"))
        for row, constraint in live.items():
            token = int(sampled.tokens[row])
            assert constraint.accept(token)
            if token != END:
                outputs[row // 2].append(token)
        expected = logits.log_softmax(-1).gather(-1, sampled.tokens[:, None])[:, 0]
        torch.testing.assert_close(sampled.logprobs, expected)  # the raw model's
    return [tokenizer.decode(tokens) for tokens in outputs]


def test_random_logits_speak_as_they_are_told(grammars, tokenizer):
    number = r"-?[0-9]{1,3}\.[0-9]{2}"
    made = [grammars.json_schema(SCHEMA), grammars.json_schema(json.dumps(SCHEMA)), grammars.regex(number)]
    made += [grammars.ebnf('root ::= ("yes" | "no") (", " root)?')]
    first, second, figure, answers = spoken(tokenizer, made, most=300)
    for text in (first, second):
        value = json.loads(text)
        assert set(value) == {"name", "age"}
        assert 0 <= value["age"] <= 99
        assert len(value["name"]) <= 8
    assert re.fullmatch(number, figure)
    assert re.fullmatch(r"(yes|no)(, (yes|no))*", answers)
    assert all(c.terminated for c in made)


def test_states(grammars, tokenizer):
    constraint = grammars.regex("[0-9]{3}")
    digits = tokenizer("123")["input_ids"]
    assert END not in bits_of(constraint)
    assert not constraint.accept(END)
    assert not constraint.accept(tokenizer("a")["input_ids"][0])
    assert not constraint.accept(-1)
    assert not constraint.accept(V)
    assert constraint.accept(digits[0])
    twin = constraint.copy()
    assert [constraint.accept(t) for t in digits[1:]] == [True, True]
    assert constraint.satisfied
    assert not constraint.terminated
    assert bits_of(constraint) == [END]
    assert not twin.satisfied
    constraint.undo(2)
    assert bits_of(constraint) == bits_of(twin) != [END]
    assert [constraint.accept(t) for t in (*digits[1:], END)] == [True, True, True]
    assert constraint.terminated
    assert not constraint.accept(digits[0])
    assert len(bits_of(constraint)) == V


def test_masked_is_what_the_sampler_allows(grammars):
    constraint, logits = grammars.regex("[ab]+"), torch.randn(1, V)
    free = torch.zeros(V, dtype=torch.bool)
    free[bits_of(constraint)] = True
    masked = constraint.masked(logits)
    assert torch.equal(masked[0, free], logits[0, free])
    assert (masked[0, ~free] == -torch.inf).all()
    token = Sampler(1, V, "cpu").sample(logits, torch.tensor([1]), torch.tensor([0]), allowed({0: constraint}, "cpu"))
    assert int(token.tokens) == int(masked.argmax())
    assert allowed({}, "cpu") is None


def test_other_ends(grammars, tokenizer):
    constraint = Grammars(tokenizer, V, ends=(7, 2)).regex("1")
    assert constraint.accept(tokenizer("1")["input_ids"][0])
    assert bits_of(constraint) == [2, 7]


def test_a_vocabulary_that_is_no_multiple_of_32(tokenizer, grammars):
    constraint = Grammars(tokenizer, V + 5).regex("1+")
    made = allowed({3: constraint, 1: grammars.regex("2+")}, "cpu")
    assert made.rows.tolist() == [3, 1]
    assert made.bits.shape == (2, words(V) + 1)
    assert constraint.masked(torch.zeros(1, V + 5))[0, V:].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("json_schema", "{", "JSON schema .* syntax error"),
        ("json_schema", {"type": "frob"}, "Unsupported type"),
        ("json_schema", {"type": object()}, "JSON schema"),
        ("regex", "([", "regular expression .* Unclosed"),
        ("regex", "a(?=b)", "Lookahead is not supported"),
        ("ebnf", 'start ::= "a"', 'root rule with name "root"'),
        ("ebnf", None, "grammar cannot be used"),
    ],
)
def test_what_cannot_be_used(grammars, kind, text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        getattr(grammars, kind)(text)
    assert ".cc" not in str(caught.value)


def test_a_tokenizer_without_an_end(grammars):
    class Endless:
        eos_token_id = None

    with pytest.raises(ConfigError, match="no end-of-text token"):
        Grammars(Endless(), V)
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        Grammars(Endless(), V, ends=(1,))


def test_without_xgrammar(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ConfigError, match="pip install xgrammar"):
        Grammars(None, V)
