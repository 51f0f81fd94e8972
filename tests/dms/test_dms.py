"""Gates, schedule, losses and adapter files."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import attach, load_adapter, save_adapter
from octavo.attachment import require_attachment
from octavo.config import Eviction
from octavo.dms import Gates, GateSpec, SoftGates
from octavo.dms.objective import eviction_loss, target_ratio
from octavo.errors import AdapterFileError, ConfigError, OutputFileError
from tiny import tiny_adapter, tiny_model, tokens


def test_fresh_gates_keep_everything():
    gates = Gates(GateSpec(2, 8, 3, Eviction(4)))
    assert torch.equal(gates.logits(0, torch.randn(2, 5, 8)), torch.full((2, 3, 5), -5.0))


def test_folding_changes_no_decision():
    gates = tiny_adapter(tiny_model()).gates
    gates.input_scale.copy_(torch.tensor([[0.5], [2.0], [3.0]]))
    folded = gates.folded(torch.device("cpu"))
    weight, bias = folded.weight, folded.bias
    hidden = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        folded = (hidden @ weight[layer].T + bias[layer]).transpose(1, 2)
        torch.testing.assert_close(folded, gates.logits(layer, hidden), rtol=1e-4, atol=1e-3)


def test_soft_gates_at_zero_temperature_are_hard_gates():
    """The identity that joins training with inference: logits agree within 1e-4 in fp32."""
    model = tiny_model()
    adapter = tiny_adapter(model)
    attach(model, adapter)
    ids = tokens(2, 120)
    with torch.no_grad():
        hard = model(ids, use_cache=False).logits
        with require_attachment(model).using(SoftGates(adapter.gates, 1e-6, None)):
            soft = model(ids, use_cache=False).logits
        with require_attachment(model).using(None):
            dense = model(ids, use_cache=False).logits
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-4)
    assert (hard - dense).abs().max() > 0.1


def test_gradients_reach_every_gate():
    model = tiny_model().requires_grad_(False)
    gates = Gates(tiny_adapter(model).gates.spec)
    attach(model)
    soft = SoftGates(gates, 0.5, torch.Generator().manual_seed(0))
    with require_attachment(model).using(soft):
        out = model.model(tokens(2, 100), use_cache=False).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert (gates.weight.grad.abs().amax((1, 2)) > 1e-3).all()
    assert (gates.bias.grad.abs().amax(1) > 1e-3).all()


def test_target_ratio_rises_linearly_and_stays():
    assert [target_ratio(s, 100, 8, 0.5) for s in (0, 25, 50, 75, 100)] == [1.0, 4.5, 8.0, 8.0, 8.0]
    assert target_ratio(0, 10, 16, 0.5, start=8) == 8


def test_eviction_loss_counts_hard_decisions_and_pushes_them():
    logits = [torch.tensor([[[2.0, -2.0, -1.0, -3.0]]]).requires_grad_()]
    missing, evicted = eviction_loss(logits, 4.0)
    assert evicted.item() == pytest.approx(0.25)
    assert missing.item() == pytest.approx(0.5)
    missing.backward()
    assert (logits[0].grad < 0).all(), "more eviction lowers the loss"
    assert eviction_loss(logits, 1.2)[0].item() == 0


def test_saved_is_loaded(tmp_path):
    model = tiny_model()
    adapter = tiny_adapter(model, window=33, shift=1, granularity="layer")
    adapter.card["note"] = {"nll": 1.5}
    adapter.gates.input_scale.fill_(2.0)
    save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    assert loaded.gates.spec == adapter.gates.spec
    assert loaded.card == adapter.card
    assert loaded.fingerprint == adapter.fingerprint
    hidden = torch.randn(1, 9, 96)
    torch.testing.assert_close(loaded.gates.logits(1, hidden), adapter.gates.logits(1, hidden))
    attach(model, tmp_path / "a")


def test_numbers_as_keys_of_a_card_do_not_spoil_the_digest(tmp_path):
    adapter = tiny_adapter(tiny_model())
    adapter.card["evaluation"] = {"rows": [{"needle": {512: 0.5, 1024: 0.25}}]}  # as strings the second sorts first
    save_adapter(adapter, tmp_path)
    assert load_adapter(tmp_path).card["evaluation"] == {"rows": [{"needle": {"512": 0.5, "1024": 0.25}}]}


def _truncate(folder, settings):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _flip(folder, settings):
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def _edit(folder, settings):
    (folder / "adapter.json").write_text(json.dumps({**settings, "window": 999}))


def _unknown(folder, settings):
    (folder / "adapter.json").write_text(json.dumps({**settings, "format": 99}))


def _garbage(folder, settings):
    (folder / "adapter.json").write_text("{")


def _list(folder, settings):
    (folder / "adapter.json").write_text("[]")


def _binary(folder, settings):
    (folder / "adapter.json").write_bytes(b"\xff\xfe\x00")


def _gone(folder, settings):
    (folder / "adapter.safetensors").unlink()


@pytest.mark.parametrize("harm", [_truncate, _flip, _edit, _unknown, _garbage, _list, _binary, _gone])
def test_broken_adapters_are_refused(tmp_path, harm):
    save_adapter(tiny_adapter(tiny_model()), tmp_path)
    harm(tmp_path, json.loads((tmp_path / "adapter.json").read_text()))
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"window": 0}, {"window": None}, {"scale": -1.0}, {"granularity": "token"}, {"shift": 7}]
)
def test_adapters_with_impossible_settings_are_refused_even_when_whole(tmp_path, change):
    from octavo import adapter_file as files

    save_adapter(tiny_adapter(tiny_model()), tmp_path)
    settings = {**json.loads((tmp_path / "adapter.json").read_text()), **change}
    settings["sha256"] = files._digest(settings, (tmp_path / "adapter.safetensors").read_bytes())
    (tmp_path / "adapter.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterFileError):
        load_adapter(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFileError, match="cannot write adapter"):
        save_adapter(tiny_adapter(tiny_model()), tmp_path / "file" / "a")


def test_impossible_specs_are_refused():
    with pytest.raises(ConfigError):
        GateSpec(0, 8, 3, Eviction(4))
    with pytest.raises(ConfigError):
        Eviction(0)
    assert isinstance(Gates(GateSpec(1, 2, 1, Eviction(1))).weight, Tensor)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), more=st.floats(1e-3, 1e3))
def test_gates_that_keep_more_mark_some_of_what_they_marked(seed, more):
    adapter = tiny_adapter(tiny_model())
    moved = adapter.keeping_more(more)
    hidden = torch.randn(2, 9, adapter.gates.spec.hidden, generator=torch.Generator().manual_seed(seed))
    for layer in range(adapter.gates.spec.layers):
        before, after = (a.gates.logits(layer, hidden) for a in (adapter, moved))
        torch.testing.assert_close(after, before - more, rtol=1e-4, atol=1e-3)
    assert moved.name != adapter.name
    assert adapter.gates.spec.offset == 5, "the gates it was made of are as they were"


@pytest.mark.parametrize("more", [0.0, -3.0, 1e300, math.nan, math.inf, None, "5"])
def test_gates_cannot_be_pushed_to_forget(more):
    with pytest.raises(ConfigError, match="positive number of logits"):
        tiny_adapter(tiny_model()).keeping_more(more)


def test_the_gates_for_copying_are_those_of_8x_that_keep_more():
    ours, made = (
        a.gates.folded(torch.device("cpu")) for a in (load_adapter("dms-5x"), load_adapter("dms-8x").keeping_more(10))
    )
    torch.testing.assert_close(ours.weight, made.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.bias, made.bias, rtol=0, atol=1e-5)


def test_gates_that_keep_more_are_saved_with_a_card_of_their_own(tmp_path):
    adapter = load_adapter("dms-8x")
    moved = adapter.keeping_more(3)
    save_adapter(moved, tmp_path)
    again = load_adapter(tmp_path)
    hidden = torch.randn(1, 5, adapter.gates.spec.hidden)
    torch.testing.assert_close(again.gates.logits(7, hidden), adapter.gates.logits(7, hidden) - 3)
    assert "suite" in adapter.card
    assert "suite" not in again.card, "nothing was measured of these"
    assert "lower by 3" in again.card["init"]
