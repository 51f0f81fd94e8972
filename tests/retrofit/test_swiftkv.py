"""SwiftKV weights are distilled, alone and with gates; starts by regression; what resumes, what is refused."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo import attach
from octavo.attachment import attachment_of, require_attachment
from octavo.cli.training import save
from octavo.dms import Gates
from octavo.errors import AdapterMismatchError, ConfigError, RetrofitError, RetrofitInterrupted
from octavo.retrofit.card import card_text
from octavo.retrofit.checkpoint import LOG
from octavo.retrofit.data import Source
from octavo.retrofit.packing import Packer, Rows
from octavo.retrofit.regression import fit_gates, fit_keys_values
from octavo.retrofit.settings import GateSettings, RetrofitSettings, SwiftSettings, before_for, kv_layers_for, shape_for
from octavo.retrofit.trainer import Retrofit
from octavo.swiftkv import SwiftKVAdapter, initial, load_swiftkv_adapter
from tiny import tiny_adapter, tiny_model
from tiny_swift import SWIFT_FAMILIES

SWIFT = SwiftSettings(2, lr=3e-3)
GATES = GateSettings(target=3, window=8, lr=1e-3)
SETTINGS = RetrofitSettings(swiftkv=SWIFT, steps=6, batch=4, micro_batch=2, length=64, recall=0.0, checkpoint_every=2)
JOINT = replace(SETTINGS, gates=GATES)


def four_layers(family: str = "llama"):
    return tiny_model(SWIFT_FAMILIES[family], num_hidden_layers=4, layer_types=["full_attention"] * 4)


@pytest.fixture
def model():
    return four_layers()


@pytest.fixture(scope="module")
def sources():
    """Running text and short documents, so that rows have boundaries."""
    rng = np.random.default_rng(0)
    text, short = (rng.integers(2, 97, 6000).astype(np.uint16) for _ in range(2))
    return [Source("text", text, None, 1.0), Source("short", short, None, 1.0, np.arange(20, 6001, 20))]


def run(model, sources, folder, settings=SETTINGS, **options) -> Retrofit:
    out = Retrofit(model, None, sources, settings, folder, **options)
    out.run()
    return out


def losses(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "group"),
    [
        ("llama", 1),
        ("llama", 2),
        ("qwen2", 2),
        ("qwen3", 1),
        ("qwen3_moe", 2),
        ("phi3", 1),
        ("granite", 2),
        ("smollm3", 1),
    ],
)
def test_training_lowers_the_loss_and_leaves_the_model_alone(family, group, sources, tmp_path):
    model = four_layers(family)
    before = [p.clone() for p in model.parameters()]
    trained = run(model, sources, tmp_path, replace(SETTINGS, steps=25, swiftkv=replace(SWIFT, group=group)))
    log = losses(tmp_path)
    first, last = (sum(line["loss"] for line in part) for part in (log[:4], log[-4:]))
    assert last < 0.85 * first
    assert log[-1]["loss"] == pytest.approx(log[-1]["kl"] + log[-1]["mse"], rel=1e-5)
    assert log[-1]["ratio"] is None
    assert 0 < log[-1]["lr"] < 0.1 * SWIFT.lr < log[3]["lr"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert attachment_of(model) is None
    (adapter,) = trained.adapters("mine")
    attach(model, adapter)
    assert adapter.card["settings"]["swiftkv"]["group"] == group


@pytest.mark.parametrize("family", SWIFT_FAMILIES)
def test_a_student_that_is_the_teacher_loses_nothing(family, sources, tmp_path):
    """Group 1 and K = the last layer: that layer's keys already come from its own residual stream."""
    model = four_layers(family)
    settings = replace(SETTINGS, swiftkv=replace(SWIFT, kv_layers=3), steps=1)
    run(model, sources, tmp_path, settings)
    (line,) = losses(tmp_path)
    assert line["loss"] == pytest.approx(0, abs=1e-6)


def test_the_upper_student_is_the_whole_student(model, sources):
    """What starts at layer K equals a forward of everything, and packed documents equal each on its own."""
    attach(model)
    attachment, base = require_attachment(model), model.base_model
    transform = initial(model, 2, 2).requires_grad_(False)
    rows = Packer(sources, None, 0.0, 64).rows(np.random.default_rng(0), 3)
    embedded = base.embed_tokens(rows.tokens)
    with torch.no_grad():
        lower = attachment.run_layers(embedded, 0, 2, rows.positions, document=rows.document)[-1]
        upper = attachment.run_layers(lower, 2, 4, rows.positions, transform=transform, document=rows.document)[-1]
        whole = attachment.run_layers(embedded, 0, 4, rows.positions, transform=transform, document=rows.document)[-1]
        torch.testing.assert_close(upper, whole, rtol=0, atol=1e-5)
        for row in range(3):
            for d in range(int(rows.document[row].max()) + 1):
                at = rows.document[row] == d
                with attachment.using(None, transform=transform):
                    alone = base(input_ids=rows.tokens[row][at][None], use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(base.norm(whole[row][at]), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [SETTINGS, JOINT], ids=["swiftkv", "joint"])
def test_resume_continues_bit_for_bit(model, sources, tmp_path, settings):
    settings = replace(settings, swiftkv=replace(SWIFT, start="regression"))
    whole = run(model, sources, tmp_path / "whole", settings)
    part = Retrofit(model, None, sources, settings, tmp_path / "part")

    def stop(report):
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(RetrofitInterrupted, match=r"after step 3 of 6.*--resume"):
        part.run(stop)
    again = Retrofit(model, None, sources, settings, tmp_path / "part")
    again.resume()
    assert again.step == 3
    again.run()
    for name, part in whole._parts().items():
        for a, b in zip(part.state_dict().values(), again._parts()[name].state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    logs = [[{**line, "seconds": 0} for line in losses(tmp_path / name)] for name in ("whole", "part")]
    assert logs[0] == logs[1]
    other = Retrofit(
        model, None, sources, replace(settings, swiftkv=replace(settings.swiftkv, temperature=1.0)), tmp_path / "part"
    )
    with pytest.raises(RetrofitError, match=r"other settings: settings\.swiftkv\.temperature 2\.0, now 1\.0;"):
        other.resume()


@pytest.mark.parametrize("settings", [SETTINGS, JOINT], ids=["swiftkv", "joint"])
def test_micro_batches_only_split_the_work(model, sources, tmp_path, settings):
    """The mean is over the tokens of the step: rows of unequal padding weigh as their tokens."""
    reports, weights = [], []
    for micro in (1, 4):
        part = Retrofit(model, None, sources, replace(settings, micro_batch=micro, steps=1), tmp_path / str(micro))
        part.noise = False
        if part.gates is not None:
            with torch.no_grad():
                part.gates.bias.fill_(0.05)
        part.run(reports.append)
        weights.append(part.transform.q.detach().clone())
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    assert reports[0].tokens == reports[1].tokens
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_padding_does_not_count(model, sources, tmp_path):
    out = Retrofit(model, None, sources, replace(SETTINGS, batch=1, micro_batch=1), tmp_path)
    rows = out._rows(0)
    document = rows.document.clone()
    document[0, 40:] = -1
    kept = Rows(rows.tokens, rows.positions, document)
    attach(model)
    values = []
    for tokens in (rows.tokens, rows.tokens.clone().index_fill_(1, torch.arange(40, 64), 7)):
        part = replace(kept, tokens=tokens)
        values.append(out._losses(part, part.counted / 40, None, 0))
    torch.testing.assert_close(values[0], values[1])


def test_gates_and_swiftkv_train_together_and_go_together(model, sources, tmp_path):
    settings = replace(JOINT, steps=20, swiftkv=replace(SWIFT, group=2), gates=replace(GATES, lr=5e-3))
    trained = run(model, sources, tmp_path / "run", settings)
    log = losses(tmp_path / "run")
    assert log[-1]["ratio"] > 1.5 > log[0]["ratio"]
    expected = log[-1]["kl"] + log[-1]["mse"] + log[-1]["missing"]
    assert log[-1]["loss"] == pytest.approx(expected, rel=1e-5)
    swiftkv, gates = trained.adapters("both", "dms-3x")
    assert gates.gates.spec.layers == swiftkv.transform.spec.cached_layers == 3
    swiftkv, gates = save([swiftkv, gates], tmp_path / "run")
    assert gates.made_on == load_swiftkv_adapter(tmp_path / "run").transform.fingerprint()
    attach(model, [tmp_path / "run", "dms-3x"])
    attached = require_attachment(model)
    assert (attached.adapter.name, attached.swiftkv.name) == ("dms-3x", "both")


def test_saved_is_what_was_returned(model, sources, tmp_path):
    (adapter,) = run(model, sources, tmp_path).adapters("mine")
    (saved,) = save([adapter], tmp_path)
    for a, b in zip(adapter.transform.parameters(), saved.transform.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    text = (tmp_path / "README.md").read_text()
    assert "skip 2 of 4 layers (50%; K=2)" in text
    assert "swiftkv.temperature 2.0" in text


def test_joint_training_starts_from_adapters(model, sources, tmp_path):
    (first,) = run(model, sources, tmp_path / "a").adapters("first")
    plain = tiny_adapter(model, window=8)
    joint = Retrofit(model, None, sources, JOINT, tmp_path / "b", init=[first, plain])
    assert torch.equal(joint.transform.q, first.transform.q)
    assert torch.equal(joint.gates.weight[:2], plain.gates.weight[:2])
    assert not joint.gates.weight[2:].any(), "KV layers from K on read something else than before"
    assert joint.start == plain.target
    joint.run()
    swiftkv, gates = joint.adapters("second")
    assert (swiftkv.card["init"], gates.card["init"]) == ("first", "tiny")
    again = Retrofit(model, None, sources, JOINT, tmp_path / "c", init=[swiftkv, gates])
    torch.testing.assert_close(again.gates.weight, gates.gates.weight)


def test_gates_are_fitted_once_even_if_the_first_step_is_interrupted(model, sources, tmp_path):
    settings = replace(JOINT, gates=replace(GATES, lr=1e-9))
    plain = tiny_adapter(model, window=8)
    whole = run(model, sources, tmp_path / "a", settings, init=[plain])
    assert (whole.gates.folded_state()["weight"][2:].abs().amax((1, 2)) > 1e-4).all()
    part = Retrofit(model, None, sources, settings, tmp_path / "b", init=[plain])
    attach(model)
    part._prepare()
    part.folder.mkdir()
    part.save()
    again = Retrofit(model, None, sources, settings, tmp_path / "b", init=[plain])
    again.resume()
    again.run()
    torch.testing.assert_close(again.gates.weight, whole.gates.weight, rtol=1e-4, atol=1e-6)


def test_frozen_transforms_take_gates(model, sources, tmp_path):
    (first,) = run(model, sources, tmp_path / "a").adapters("first")
    settings = replace(JOINT, swiftkv=replace(SWIFT, lr=0.0))
    joint = run(model, sources, tmp_path / "b", settings, init=[first])
    swiftkv, gates = joint.adapters("second")
    torch.testing.assert_close(swiftkv.transform.kv, first.transform.kv, rtol=1e-5, atol=1e-6)
    assert gates.gates.weight.any()
    with pytest.raises(ConfigError, match="lr must be positive"):
        replace(settings, gates=None)


# Regression


def silent_layers(model):
    """Layers 2 and 3 leave the residual stream as it is."""
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.layers[3].input_layernorm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(0))
    return model


def fitted(model, sources, group, rows=None):
    attach(model)
    swiftkv = initial(model, 2, group)
    rows = rows or Packer(sources, None, 0.0, 64).rows(np.random.default_rng(0), 16)
    fit_keys_values(require_attachment(model), swiftkv, rows.split(4))
    return swiftkv


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_regression_finds_a_planted_map(family, sources):
    """Layers 2 and 3 add nothing to the stream, so their keys are linear in n: their own projections, rescaled."""
    model = silent_layers(four_layers(family))
    rows = Packer(sources, None, 0.0, 256).rows(np.random.default_rng(0), 16)
    swiftkv = fitted(model, sources, 1, rows)
    ratio = model.model.layers[3].input_layernorm.weight / model.model.layers[2].input_layernorm.weight
    for which, name in enumerate(("k_proj", "v_proj")):
        projections = [getattr(layer.self_attn, name) for layer in model.model.layers[2:]]
        torch.testing.assert_close(swiftkv.kv[which, 0], projections[0].weight, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(swiftkv.kv[which, 1], projections[1].weight * ratio, rtol=1e-2, atol=1e-3)
        if swiftkv.kv_bias is not None:
            expected = torch.stack([p.bias for p in projections])
            torch.testing.assert_close(swiftkv.kv_bias[which], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("start", ["published", "regression"])
def test_the_token_before_helps_and_is_trained(start, model, sources, tmp_path):
    found = {}
    for before in (0, 12):
        swift = replace(SWIFT, start=start, before=before)
        trained = run(model, sources, tmp_path / str(before), replace(SETTINGS, steps=25, swiftkv=swift))
        found[before] = [line["loss"] for line in losses(tmp_path / str(before))]
    if start == "regression":
        assert found[12][0] < 0.97 * found[0][0]
    else:
        assert found[12][0] == pytest.approx(found[0][0]), "nothing is made of it yet"
    assert sum(found[12][-4:]) < sum(found[0][-4:])
    (adapter,) = trained.adapters("mine")
    assert adapter.transform.hand.shape == (12, 96)
    assert not torch.equal(adapter.transform.hand, initial(model, 2, before=12).hand)
    assert adapter.transform.kv_before.any()
    assert "Tokens hand 12 numbers" in card_text(adapter)
    again = Retrofit(model, None, sources, replace(SETTINGS, swiftkv=swift), tmp_path / "again", init=[adapter])
    assert torch.equal(again.transform.kv_before, adapter.transform.kv_before)


def test_what_is_handed_on_is_as_in_the_adapter_that_a_run_starts_from(model):
    adapter = SwiftKVAdapter("a", initial(model, 2, before=7), {})
    assert (before_for(None, [adapter]), before_for(None), before_for(3, [adapter])) == (7, 0, 3)
    with pytest.raises(ConfigError, match="before must be a whole number"):
        replace(SWIFT, before=-1)


@pytest.mark.parametrize("group", [1, 2])
def test_regression_starts_lower_than_averages(model, sources, tmp_path, group):
    begun = {}
    for start in ("published", "regression"):
        settings = replace(SETTINGS, steps=1, swiftkv=replace(SWIFT, group=group, start=start))
        run(model, sources, tmp_path / start, settings)
        begun[start] = losses(tmp_path / start)[0]["loss"]
    assert begun["regression"] < 0.97 * begun["published"]


def test_gates_of_the_base_model_are_carried_over_to_n(sources):
    """Where layers 2 and 3 add nothing, what the base model's gates say of their inputs is linear in n."""
    model = silent_layers(four_layers())
    attach(model)
    attachment, base = require_attachment(model), model.base_model
    rows = Packer(sources, None, 0.0, 256).rows(np.random.default_rng(0), 16)
    taught_by = tiny_adapter(model, window=8).gates
    taught_by.weight.data.mul_(0.01)  # within the range of logits that counts
    transform = initial(model, 2, 2)
    gates = Gates(replace(taught_by.spec, layers=3))
    fit_gates(attachment, transform, gates, taught_by, rows.split(4))
    with torch.no_grad():
        stream = attachment.run_layers(base.embed_tokens(rows.tokens), 0, 2, rows.positions, document=rows.document)[-1]
        inputs = [layer.input_layernorm(stream) for layer in base.layers[2:]]
        wanted = torch.stack([taught_by.logits(j, x) for j, x in zip((2, 3), inputs, strict=True)]).mean(0)
        error = (gates.logits(2, transform.normalised(stream)) - wanted).square().mean()
    assert error < 0.01 * wanted.var()
    assert not gates.weight[:2].any()


def test_padding_is_left_out_of_the_regression(model, sources):
    rows = Packer(sources, None, 0.0, 64).rows(np.random.default_rng(0), 8)
    document = rows.document.clone()
    document[:, 40:] = -1
    other = rows.tokens.clone()
    other[:, 40:] = 5
    one, two = (fitted(model, sources, 1, Rows(t, rows.positions, document)) for t in (rows.tokens, other))
    assert torch.equal(one.kv, two.kv)


# Shapes and refusals


@pytest.mark.parametrize(
    ("layers", "skip", "group", "expected"),
    [(30, 0.33, 1, 20), (30, 0.5, 1, 15), (30, 0.5, 2, 14), (30, 0.9, 1, 3), (30, 0.4, 4, 18), (2, 0.5, 1, 1)],
)
def test_at_least_the_share_is_skipped(layers, skip, group, expected):
    assert kv_layers_for(layers, skip, group) == expected
    assert shape_for(layers, skip, None, group) == (expected, group)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 0.0, None, 1), "between 0 and 1"),
        ((30, 1.0, None, 1), "between 0 and 1"),
        ((30, 0.95, None, 4), "leaves none"),
        ((30, 0.5, None, 0), "at least 1"),
        ((30, 0.5, 15, 1), "not both"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        shape_for(*arguments)


@pytest.mark.parametrize(
    "change", [{"kv_layers": 0}, {"group": 0}, {"lr": -1}, {"temperature": 0}, {"mse_weight": -1}, {"start": "best"}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError):
        replace(SWIFT, **change)


@pytest.mark.parametrize(("kv_layers", "group"), [(4, 1), (9, 1), (1, 2)])
def test_transforms_must_fit_the_model(model, sources, tmp_path, kv_layers, group):
    with pytest.raises(ConfigError, match=r"SwiftKV's first|do not divide"):
        Retrofit(model, None, sources, replace(SETTINGS, swiftkv=SwiftSettings(kv_layers, group)), tmp_path)


def test_adapters_that_do_not_fit_the_run_are_refused(model, sources, tmp_path):
    spec = initial(model, 2, 2)
    (swiftkv,) = run(model, sources, tmp_path / "a", replace(SETTINGS, steps=1)).adapters("swift")
    other = SwiftKVAdapter("other", spec, swiftkv.fingerprint)
    assert shape_for(4, None, None, None, [other]) == (2, 2)
    gates = tiny_adapter(model, window=8)
    on_other = replace(gates, made_on=spec.fingerprint())
    with pytest.raises(ConfigError, match="K=2, groups of 2 and before=0"):
        Retrofit(model, None, sources, SETTINGS, tmp_path, init=[other])
    with pytest.raises(ConfigError, match="does not train"):
        Retrofit(model, None, sources, SETTINGS, tmp_path, init=[gates])
    with pytest.raises(ConfigError, match="does not train"):
        Retrofit(model, None, sources, replace(JOINT, swiftkv=None), tmp_path, init=[swiftkv])
    with pytest.raises(ConfigError, match="two adapters"):
        Retrofit(model, None, sources, JOINT, tmp_path, init=[swiftkv, other])
    with pytest.raises(ConfigError, match="made on SwiftKV with K=2, groups of 2 and before=0"):
        Retrofit(model, None, sources, JOINT, tmp_path, init=[swiftkv, on_other])
    with pytest.raises(AdapterMismatchError):
        Retrofit(tiny_model(num_hidden_layers=5), None, sources, SETTINGS, tmp_path, init=[swiftkv])
