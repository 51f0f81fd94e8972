"""The evaluation measures what it says: NLL, exact needles, slots; and its rivals keep as much as the gates."""

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from octavo import KVCache, attach, detach, evaluate
from octavo.attachment import attachment_of
from octavo.attachment.adapters import SHIPPED
from octavo.attachment.supported import fingerprint
from octavo.cli.demo import show_heat_map
from octavo.cli.plots import evaluation as draw
from octavo.cli.plots import heat_map, heat_map_text, skip_curve, training
from octavo.cli.training import card_text, evaluation_table
from octavo.dms import Adapter, load_adapter
from octavo.errors import AdapterMismatchError, ConfigError, PromptError, TextFileError, UnsupportedModelError
from octavo.retrofit.agreement import AgreementSettings, Question
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.data import Source
from octavo.retrofit.measuring import Bench
from octavo.retrofit.needles import needle_cases
from octavo.retrofit.results import EvaluationSettings, Row, cells, skip_points
from octavo.swiftkv import SwiftKVAdapter, initial
from tiny import tiny_adapter, tiny_model

SETTINGS = EvaluationSettings(nll_length=400, nll_from=100, texts=2, lengths=(320,), cases=12, batch=2)


@pytest.fixture(scope="module")
def student():
    """The same for all tests here, none of which changes it."""
    torch.manual_seed(0)
    return tiny_model(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )


@pytest.fixture(scope="module")
def source():
    return Source("random", np.random.default_rng(0).integers(5, 49000, 4000).astype(np.uint16), None, 1.0)


@pytest.fixture(scope="module")
def result(student, tokenizer, source):
    adapter = tiny_adapter(student, window=16, rate=0.8)
    return evaluate(student, tokenizer, source.tokens, [adapter], SETTINGS), adapter


def swiftkv_adapter(student, name="swiftkv"):
    """Keys and values of layer 1 from the wrong norm, so that the transform is not the base model."""
    swiftkv = initial(student, 1)
    with torch.no_grad():
        swiftkv.kv.add_(torch.randn(swiftkv.kv.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    return SwiftKVAdapter(name, swiftkv, fingerprint(student))


def gates_on(swiftkv, student):
    plain = tiny_adapter(student, window=16, rate=0.8)
    return Adapter("gates", plain.gates, plain.fingerprint, 2.0, made_on=swiftkv.transform.fingerprint())


@pytest.fixture(scope="module")
def skipping(student, tokenizer, source):
    """An evaluation of a transform, of it with gates, and of plain gates, with questions; and these entries."""
    swiftkv = swiftkv_adapter(student)
    entries = [swiftkv, (swiftkv, gates_on(swiftkv, student)), tiny_adapter(student, window=16, rate=0.8)]
    settings = replace(SETTINGS, answers=AgreementSettings(cases=3, max_new_tokens=8, batch=2))
    questions = [Question("How many are 2 and 3?", "#### 5"), Question("And 4 and 5?", "#### 9")]
    return evaluate(student, tokenizer, source.tokens, entries, settings, questions=questions), entries


def test_transforms_and_gates_on_them_are_measured(skipping, student, source):
    out, entries = skipping
    names = ["dense", "swiftkv", "swiftkv + gates", "tiny"]
    assert [row.policy for row in out.rows] == names, "no rivals where the first adapter is not plain gates"
    assert [row.skipped for row in out.rows] == [None, 0.5, 0.5, None]
    assert attachment_of(student) is None
    starts = np.linspace(0, len(source.tokens) - 400, 2).astype(int)
    ids = torch.stack([torch.from_numpy(source.tokens[s : s + 400].astype(np.int64)) for s in starts])
    for row, entry in zip(out.rows[1:], entries, strict=True):
        attach(student, list(entry) if isinstance(entry, tuple) else entry)
        cache = KVCache(student)
        with torch.no_grad():
            logits = student(ids, use_cache=False).logits
            student(ids[:1], past_key_values=cache)
        expected = F.cross_entropy(logits[:, 99:-1].flatten(0, 1), ids[:, 100:].flatten())
        assert row.nll == pytest.approx(expected.item(), rel=1e-5)
        assert (row.nbytes, row.dense_nbytes) == (cache.nbytes, cache.dense_nbytes)
        assert row.kept == pytest.approx(cache.kept.float().mean().item())
    detach(student)
    assert len({row.nll for row in out.rows}) == 4


def test_answers_are_in_the_rows_the_table_and_the_json(skipping):
    out, _ = skipping
    assert out.questions == 2
    assert "2 questions" in evaluation_table(out).title
    assert (out.rows[0].same, out.rows[0].agreed) == (0.0, 1.0), "a random model answers without numbers"
    assert all(0 <= row.agreed <= 1 for row in out.rows)
    heads, *lines = cells((320,), out.rows)
    assert heads[:3] == ["policy", "layers skipped", "NLL"]
    assert lines[1][heads.index("layers skipped")] == "50.0%"
    assert lines[0][heads.index("same tokens")] == "100.0%"
    again = [Row(**row) for row in json.loads(json.dumps(out.to_json()))["rows"]]
    assert cells((320,), again) == [heads, *lines]
    assert len(evaluation_table(out).columns) == 1 + len(out.rows)


def test_weights_are_rounded_for_the_measurement_and_not_in_the_adapter(student, tokenizer, source):
    adapter = swiftkv_adapter(student)
    before = adapter.transform.kv.clone()
    evaluate(
        copy.deepcopy(student).bfloat16(), tokenizer, source.tokens, [adapter], replace(SETTINGS, lengths=(), texts=1)
    )
    assert adapter.transform.kv.dtype == torch.float32
    assert torch.equal(adapter.transform.kv, before)


def test_gates_of_the_base_model_are_refused_on_a_transform(student, tokenizer, source):
    swiftkv = swiftkv_adapter(student)
    for entry in ((swiftkv, tiny_adapter(student)), gates_on(swiftkv, student)):
        with pytest.raises(AdapterMismatchError):
            evaluate(student, tokenizer, source.tokens, [entry], SETTINGS)
    assert attachment_of(student) is None


def test_skip_curve_takes_transforms_only(skipping, tmp_path):
    out, entries = skipping
    (point,) = skip_points(out, entries)
    assert point == (0.5, out.rows[1].nll - out.rows[0].nll, "swiftkv")
    skip_curve([point, (0.3, 0.01, "K=20")], tmp_path / "s.png", 0.04)
    skip_curve([], tmp_path / "none.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["dms-8x-v1", "dms-16x-v1"])
def test_cards_written_earlier_still_read_the_same(name):
    folder = SHIPPED / name
    assert card_text(load_adapter(folder)) == (folder / "README.md").read_text()


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
    detach(student)
    row = out.rows[1]
    assert (row.nbytes, row.dense_nbytes) == (cache.nbytes, cache.dense_nbytes)
    assert row.kept == pytest.approx(cache.kept.float().mean().item())


def test_needles_are_where_they_should_be(tokenizer, source):
    cases, answers = needle_cases(tokenizer, source.tokens, 320, 12, SETTINGS.depths, np.random.default_rng(0))
    assert cases.shape == (12, 320)
    for i, (row, n) in enumerate(zip(cases, answers, strict=True)):
        text, answer = tokenizer.decode(row), tokenizer.decode(row[-n:])
        assert len(answer) == 7
        assert f"is {answer}. Remember it." in text
        place = text.index(f"is {answer}. Remember") / len(text)
        assert abs(place - SETTINGS.depths[i % 10]) < 0.45


def test_a_model_that_knows_finds_every_needle(student, tokenizer, source):
    """Feed gold hidden states: `found` is an exact match of every answer token."""
    student = copy.deepcopy(student)
    bench = Bench(student, tokenizer, source.tokens, SETTINGS)
    bench.head = lambda hidden: hidden
    assert all(bench.found(lambda ids: F.one_hot(ids.roll(-1, 1), 49152).float(), 320))
    wrong = torch.arange(320) == 317
    assert not any(bench.found(lambda ids: F.one_hot(ids.roll(-1, 1) + wrong, 49152).float(), 320))


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
    printed = Console(width=80, record=True, file=io.StringIO())
    printed.print(evaluation_table(out))
    text = printed.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{row.nll:.4f}" in text and f"{row.nbytes:,}" in text for row in out.rows if row.nbytes)
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


def test_lengths_are_measured_once(student, tokenizer, source):
    settings = replace(SETTINGS, lengths=(320, 300, 320), cases=1, texts=1)
    assert settings.lengths == (320, 300)
    out = evaluate(student, tokenizer, source.tokens, [], settings)
    heads, line = cells((300, 320), out.rows)
    assert [heads[i] for i in range(len(heads)) if "needle" in heads[i]] == ["needle 300", "needle 320"]
    assert line[heads.index("needle 300")] == f"{out.rows[0].needle[300]:.3f}"


@pytest.mark.parametrize(("asked", "real"), [(16, 2), (1, 1)])
def test_texts_do_not_overlap_and_the_settings_say_how_many(student, tokenizer, source, asked, real):
    settings = replace(SETTINGS, texts=asked, lengths=(), batch=1)
    assert evaluate(student, tokenizer, source.tokens[:1000], [], settings).settings.texts == real


LONG = [Question("What is 1 + 1?", "2"), Question("word " * 1100, "2")]


@pytest.mark.parametrize(
    ("change", "questions", "error", "message"),
    [
        ({"nll_length": 1100}, [], ConfigError, "1,024 positions"),
        ({"lengths": (300, 1100)}, [], ConfigError, "1,024 positions"),
        ({}, LONG, PromptError, "question 2 has"),
    ],
)
def test_what_the_model_has_no_positions_for_is_refused_first(
    student, tokenizer, source, change, questions, error, message
):
    rows = []
    with pytest.raises(error, match=message):
        evaluate(student, tokenizer, source.tokens, [], replace(SETTINGS, **change), rows.append, questions)
    assert not rows
    assert attachment_of(student) is None


@pytest.mark.parametrize(("lengths", "said"), [((320,), True), ((), False)])
def test_cards_speak_of_needles_only_where_some_were_looked_for(result, lengths, said):
    out, adapter = result
    card = {"evaluation": replace(out, settings=replace(out.settings, lengths=lengths)).to_json(), "settings": {}}
    assert ("(2 texts), 12 needles per length, bytes" in card_text(replace(adapter, card=card))) is said
    assert ("needles per length" in card_text(replace(adapter, card=card))) is said


@pytest.mark.parametrize("layers", [1, 34, 100])
def test_the_demo_s_heat_map_shows_every_cell(tmp_path, layers):
    console = Console(width=80, record=True, file=io.StringIO())
    show_heat_map(torch.ones(layers, 2), console, tmp_path / "h.png")
    lines = [line for line in console.export_text().splitlines() if line.startswith("head 1 |")]
    assert sum(line.count("█") for line in lines) == 2 * layers
    assert max(map(len, lines)) <= 80


CACHED = replace(SETTINGS, kv_dtype="int8", chunk=32, cases=4)


@pytest.fixture(scope="module")
def through_caches(student, tokenizer, source):
    """An evaluation through caches of the model alone, of gates, and of gates on a transform; and these entries."""
    swiftkv = swiftkv_adapter(student)
    entries = [tiny_adapter(student, window=16, rate=0.8), (swiftkv, gates_on(swiftkv, student))]
    return evaluate(student, tokenizer, source.tokens, entries, CACHED), entries


def test_quantised_pages_are_measured_beside_the_model_s_own(through_caches, student, tokenizer, source):
    """In the model's dtype a cache is the same function as a forward without one; int8 pages change it a little."""
    out, entries = through_caches
    names = ["dense", "tiny", "swiftkv + gates"]
    assert [row.policy for row in out.rows] == [f"{name} {pages}" for name in names for pages in ("fp32", "int8")]
    assert attachment_of(student) is None
    without = evaluate(student, tokenizer, source.tokens, entries, replace(CACHED, kv_dtype=None, baselines=False))
    for expected, own, int8 in zip(without.rows, out.rows[::2], out.rows[1::2], strict=True):
        assert own.nll == pytest.approx(expected.nll, abs=1e-4)
        assert (own.needle, own.skipped) == (expected.needle, expected.skipped)
        assert 1e-6 < abs(int8.nll - own.nll) < 0.05
        assert int8.nbytes < own.nbytes
        assert int8.dense_nbytes == own.dense_nbytes
        assert int8.skipped == own.skipped
    json.dumps(out.to_json())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_bytes_of_quantised_pages_are_those_of_the_first_text_s_cache(through_caches, student, source, index):
    out, entries = through_caches
    entry = [None, *entries][index]
    attach(student, list(entry) if isinstance(entry, tuple) else entry, chunk=32, kv_dtype="int8")
    cache = KVCache(student)
    with torch.no_grad():
        student.model(torch.from_numpy(source.tokens[:400].astype(np.int64))[None], past_key_values=cache)
    detach(student)
    row = out.rows[2 * index + 1]
    assert (row.nbytes, row.dense_nbytes) == (cache.nbytes, cache.dense_nbytes)
    assert row.kept == pytest.approx(cache.kept.float().mean().item())


def test_short_chunks_read_more_quantised_pages(student, tokenizer, source):
    """What lies in a token's own chunk is not quantised, so one chunk for all measures nothing."""
    costs = []
    for chunk in (8, 400):
        settings = replace(CACHED, lengths=(), chunk=chunk, kv_dtype="fp8")
        own, quantised = evaluate(student, tokenizer, source.tokens, [], settings).rows
        costs.append(abs(quantised.nll - own.nll))
    assert costs[0] > 1e-5
    assert costs[1] < 1e-6


def test_what_has_no_quantised_form_is_refused(student, tokenizer, source):
    with pytest.raises(ConfigError, match="questions or kv_dtype"):
        evaluate(student, tokenizer, source.tokens, [], CACHED, questions=[Question("1?", "1")])
    whole = tiny_model(vocab_size=49152)
    whole.config.rope_parameters = {**whole.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="in one chunk"):
        evaluate(whole, tokenizer, source.tokens, [], CACHED)
    assert attachment_of(whole) is None
    for change in ({"kv_dtype": "int4"}, {"chunk": 0}):
        with pytest.raises(ConfigError):
            replace(CACHED, **change)


def test_skip_curve_of_two_page_dtypes_is_the_model_s_own(through_caches, student, tokenizer, source):
    swiftkv = swiftkv_adapter(student)
    out = evaluate(student, tokenizer, source.tokens, [swiftkv], replace(CACHED, lengths=(), texts=1))
    assert skip_points(out, [swiftkv]) == [(0.5, out.rows[2].nll - out.rows[0].nll, "swiftkv fp32")]
    assert "caches read in chunks of 32" in evaluation_table(out).title
