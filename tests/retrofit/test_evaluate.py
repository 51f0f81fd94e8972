"""The evaluation measures what it says: NLL, exact needles, slots; and its rivals keep as much as the gates."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo import KVCache, attach, evaluate
from octavo.attachment import attachment_of
from octavo.errors import AdapterMismatchError, ConfigError, TextFileError
from octavo.plots import evaluation as draw
from octavo.plots import heat_map, heat_map_text, training
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.command import card_text, evaluation_table
from octavo.retrofit.evaluate import EvaluationSettings, needle_cases
from tiny import tiny_adapter, tiny_model

SETTINGS = EvaluationSettings(nll_length=400, nll_from=100, texts=2, lengths=(320,), cases=12, batch=2)


@pytest.fixture
def result(student, tokenizer, source):
    adapter = tiny_adapter(student, window=16, rate=0.8)
    return evaluate(student, tokenizer, source.tokens, [adapter], SETTINGS), adapter


def test_all_policies_are_measured_and_the_model_is_left_alone(result, student):
    out, _ = result
    assert [row.policy for row in out.rows] == ["dense", "tiny", *BASELINES]
    assert attachment_of(student) is None
    for row in out.rows:
        assert row.nll > 0
        assert set(row.needle) == {320}
        assert len(row.depth[320]) == len(SETTINGS.depths)
    json.dumps(out.to_json())


def test_rivals_keep_as_many_slots_as_the_gates(result):
    rows = {row.policy: row for row in result[0].rows}
    for name in BASELINES:
        assert rows[name].kept == pytest.approx(rows["tiny"].kept, rel=0.06)


def test_dense_nll_is_the_model_s_own(result, student, source):
    starts = np.linspace(0, len(source.tokens) - 400, 2).astype(int)
    ids = torch.stack([torch.from_numpy(source.tokens[s : s + 400].astype(np.int64)) for s in starts])
    with torch.no_grad():
        logits = student(ids).logits
    expected = F.cross_entropy(logits[:, 99:-1].flatten(0, 1), ids[:, 100:].flatten())
    assert result[0].rows[0].nll == pytest.approx(expected.item(), rel=1e-5)


def test_adapter_bytes_are_a_real_cache_s(result, student, source):
    out, adapter = result
    attach(student, adapter)
    cache = KVCache(student)
    with torch.no_grad():
        student(torch.from_numpy(source.tokens[:400].astype(np.int64))[None], past_key_values=cache)
    row = out.rows[1]
    assert (row.nbytes, row.dense_nbytes) == (cache.nbytes, cache.dense_nbytes)
    assert row.kept == pytest.approx(cache.kept.float().mean().item())


def test_needles_are_where_they_should_be(tokenizer, source):
    cases, answers = needle_cases(tokenizer, source.tokens, 320, SETTINGS, np.random.default_rng(0))
    assert cases.shape == (12, 320)
    for i, (row, n) in enumerate(zip(cases, answers, strict=True)):
        text, answer = tokenizer.decode(row), tokenizer.decode(row[-n:])
        assert len(answer) == 7
        assert f"is {answer}. Remember it." in text
        place = text.index(f"is {answer}. Remember") / len(text)
        assert abs(place - SETTINGS.depths[i % 10]) < 0.45


def test_a_model_that_knows_finds_every_needle(student, tokenizer, source):
    """Feed gold hidden states: `found` is an exact match of every answer token."""
    from octavo.retrofit.evaluate import _Bench

    attach(student)
    bench = _Bench(student, tokenizer, source.tokens, SETTINGS)
    student.get_output_embeddings = lambda: lambda hidden: hidden
    bench.hidden = lambda ids, policy: F.one_hot(ids.roll(-1, 1), 49152).float()
    assert all(bench.found(None, 320))
    bench.hidden = lambda ids, policy: F.one_hot(ids.roll(-1, 1) + (torch.arange(320) == 317), 49152).float()
    assert not any(bench.found(None, 320))


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_keep_what_they_were_told(name):
    length, kept = 1000, 200
    policy = BASELINES[name](length, kept)
    key = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(0))
    stays = torch.isfinite(policy.log_keep(0, torch.zeros(1, length, 4), key))
    stays[..., -policy.window :] = True
    assert stays.sum(-1).float().mean().item() == pytest.approx(kept, rel=0.1)


def test_sinks_and_small_keys_are_what_is_kept():
    key = torch.arange(1.0, 101.0).expand(1, 1, 100)[..., None]
    sinks = BASELINES["sinks + recent"](100, 20).log_keep(0, key, key)
    assert torch.isfinite(sinks[0, 0]).nonzero().flatten().tolist() == [0, 1, 2, 3]
    small = torch.isfinite(BASELINES["key norm"](100, 40).log_keep(0, key, key))[0, 0]
    assert small[:20].all()
    assert not small[80:].any()


def test_an_adapter_of_another_model_is_refused(student, tokenizer, source):
    with pytest.raises(AdapterMismatchError):
        evaluate(student, tokenizer, source.tokens, [tiny_adapter(tiny_model())], SETTINGS)
    assert attachment_of(student) is None


def test_bad_settings_and_short_texts_are_refused(student, tokenizer, source):
    with pytest.raises(TextFileError, match="400 are needed"):
        evaluate(student, tokenizer, source.tokens[:300], [], SETTINGS)
    for change in (
        {"nll_from": 0},
        {"nll_from": 500, "nll_length": 400},
        {"cases": 0},
        {"depths": (2.0,)},
        {"lengths": (5,)},
    ):
        with pytest.raises(ConfigError):
            EvaluationSettings(**change)


def test_tables_cards_and_plots_show_the_numbers(result, tmp_path):
    out, adapter = result
    assert evaluation_table(out).row_count == 5
    adapter.card["evaluation"] = out.to_json()
    adapter.card["settings"] = {"steps": 3}
    text = card_text(adapter)
    assert f"{out.rows[1].nll:.4f}" in text
    assert "key norm" in text
    draw(out, tmp_path / "e.png")
    heat_map(torch.rand(3, 2), tmp_path / "h.png", "t")
    training([{"step": i, "kl": 0.1, "ratio": 2.0, "target": 3.0} for i in range(3)], tmp_path / "t.png")
    for name in ("e", "h", "t"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert heat_map_text(torch.tensor([[0.0, 1.0], [1.0, 0.26]])) == ["  ██", "██▒▒"]
