"""Published DMS checkpoints: tiny models in exactly the published layouts, read and written; broken ones refused."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.attachment import attachment_of
from octavo.attachment.adapters import load_adapter
from octavo.attachment.published import files_needed
from octavo.config import Eviction
from octavo.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from octavo.models import find_adapters, save_published
from published_gates import BORROWED, IDS, base, gate_state, publish, published_logits
from tiny import feed, tiny_adapter, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = {"dms_alpha_per": "layer"}
GATE = "model.layers.1.self_attn.dms_proj_alpha"


@pytest.fixture
def loaded(monkeypatch):
    """`octavo.load` without the tokenizer, which these checkpoints do not have and which takes longest."""
    module = sys.modules["octavo.models.load"]  # the package has a function of this name
    monkeypatch.setattr(module, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: None))

    def load(folder, adapter="auto", **settings):
        return octavo.load(folder, adapter, device="cpu", dtype=torch.float32, **settings)[0]

    return load


def uncached(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


LAYOUTS = {
    "llama, head": ("llama", {}, False, {}),
    "llama, layer, biases": ("llama", LAYER, True, {"attention_bias": True}),
    "llama, biases beside none": ("llama", {}, True, {}),
    "qwen3, head": ("qwen3", {}, False, {}),
    "qwen3, layer": ("qwen3", LAYER, False, {}),
    "llama, borrowed": ("llama", BORROWED, None, {}),
    "qwen2, borrowed of biased queries": ("qwen2", BORROWED, None, {}),
    "qwen3, borrowed": ("qwen3", BORROWED, None, {}),
    "qwen3, borrowed, layer": ("qwen3", {**BORROWED, **LAYER}, None, {}),
    "qwen3, borrowed as the first ones say": ("qwen3", {"dms_separate_alpha": "absent"}, None, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_checkpoint_answers_as_its_rule_says_and_so_does_what_is_written_of_it(tmp_path, loaded, layout):
    family, changes, bias, config = LAYOUTS[layout]
    model = base(family, **config)
    gates = {} if bias is None else gate_state(model, bias)
    folder, state, fields = publish(tmp_path / "p", model, gates, **changes)
    expected = published_logits(model, state, fields)
    ours = loaded(folder)
    assert type(ours) is type(model)
    close(uncached(ours), expected)
    close(feed(ours, IDS, 45)[0], expected)
    never = published_logits(model, state, {**fields, "dms_window_size": 1000})
    assert (expected - never).abs().max() > 0.05, "eviction must matter here"

    save_published(ours, attachment_of(ours).adapter, tmp_path / "again")
    again = loaded(tmp_path / "again")
    old, new = (attachment_of(each).adapter for each in (ours, again))
    assert new.gates.spec == old.gates.spec
    assert all(torch.equal(a, b) for a, b in zip(old.gates.parameters(), new.gates.parameters(), strict=True))
    assert torch.equal(uncached(again), uncached(ours))
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    names = ("dms_alpha_scale", "dms_initial_alpha_offset", "dms_window_size", "dms_alpha_per", "dms_cr")
    assert {name: written[name] for name in names} == {name: fields[name] for name in names}
    assert written["dms_separate_alpha"] is (bias is not None)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == state.keys()


def test_what_a_model_is_without_its_gates(tmp_path, loaded):
    """With gates of its own it is the base model; what queries lend stays zero, as theirs with eviction off."""
    for changes in ({}, BORROWED):
        model = base("qwen3")
        gates = {} if changes else gate_state(model)
        folder, state, fields = publish(tmp_path / str(len(changes)), model, gates, **changes)
        never = published_logits(model, state, {**fields, "dms_window_size": 1000})
        bare = loaded(folder, None)
        assert attachment_of(bare).adapter is None
        close(uncached(bare), never)
        close(feed(bare, IDS, 45)[0], never)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dms_disable_eviction": True}))
        off = loaded(folder)
        assert attachment_of(off).adapter is None
        assert torch.equal(uncached(off), uncached(bare))
        model.config._attn_implementation = "sdpa"
        assert torch.equal(uncached(octavo.detach(off)), uncached(model))


@pytest.mark.parametrize("changes", [BORROWED, {}])
def test_gates_that_keep_more_are_published_so(tmp_path, loaded, changes):
    model = base("qwen3")
    folder, *_ = publish(tmp_path / "p", model, {} if changes else gate_state(model), **changes)
    ours = loaded(folder)
    before, more = uncached(ours), attachment_of(ours).adapter.keeping_more(1.5)
    octavo.attach(ours, more)
    moved = uncached(ours)
    save_published(ours, more, tmp_path / "more")
    again = loaded(tmp_path / "more")
    assert torch.equal(uncached(again), moved)
    assert not torch.equal(moved, before)


def test_chunks_padding_and_half_precision_hold_for_borrowed_channels(tmp_path, loaded):
    model = base("qwen3")
    folder, state, fields = publish(tmp_path / "p", model, {}, **BORROWED)
    expected = published_logits(model, state, fields)
    ours = loaded(folder, chunk=16)
    close(feed(ours, IDS, 50)[0], expected)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), IDS], 1)
    mask = (torch.arange(65) >= 5).long().expand(2, -1)
    with torch.no_grad():
        close(ours(padded, attention_mask=mask).logits[:, 5:], expected)
    octavo.save_published(ours, attachment_of(ours).adapter, tmp_path / "half", dtype=torch.bfloat16)
    half = octavo.load(tmp_path / "half", device="cpu", dtype=torch.bfloat16)[0]
    assert torch.isfinite(uncached(half)).all()
    with pytest.raises(ConfigError, match="no adapter for others"):
        octavo.save_adapter(attachment_of(ours).adapter, tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="queries of the model that they were published with"):
        octavo.attach(model, folder)


def test_gates_with_weights_of_their_own_fit_the_base_model(tmp_path):
    model = base("llama")
    folder, state, fields = publish(tmp_path / "p", model, gate_state(model))
    expected = published_logits(model, state, fields)
    adapter = load_adapter(folder)
    assert (adapter.name, adapter.target, adapter.card) == ("p", 8.0, {"published": "NVIDIA"})
    assert adapter.gates.spec.eviction == Eviction(12, 1)
    octavo.save_adapter(adapter, tmp_path / "a")
    close(uncached(octavo.attach(model, tmp_path / "a")), expected)


def test_a_tokenizer_may_lie_elsewhere(tmp_path, smollm):
    model = base("llama")
    folder, _, _ = publish(tmp_path / "p", model, gate_state(model))
    with pytest.raises(ModelNotFoundError, match=r"cannot load a tokenizer from .*tokenizer=\.\.\.") as caught:
        octavo.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    smollm[1].save_pretrained(tmp_path / "words")
    _, words = octavo.load(folder, device="cpu", tokenizer=tmp_path / "words")
    assert words("harbour")["input_ids"] == smollm[1]("harbour")["input_ids"]


def test_channels_that_the_attention_norm_removes_cannot_be_read(tmp_path):
    model = base("llama")
    gates = gate_state(model)
    norm = model.model.layers[1].input_layernorm.weight.data
    norm[4], norm[7] = 0.0, 1e-20
    folder, _, _ = publish(tmp_path / "p", model, gates)
    with pytest.raises(AdapterFileError, match=r"gate of layer 1 reads 2 channels .*layers\.1\.input_layernorm"):
        load_adapter(folder)
    gates[f"{GATE}_norm.weight"][[4, 7]] = 0
    adapter = load_adapter(publish(tmp_path / "q", model, gates)[0])
    assert torch.isfinite(adapter.gates.weight).all()
    save_published(model, adapter, tmp_path / "r")
    assert torch.equal(load_adapter(tmp_path / "r").gates.weight, adapter.gates.weight)


CONFIGS = {
    "unknown fields": ({"dms_shift": 0, "dms_new": 1}, r"unknown fields, .*: dms_new, dms_shift"),
    "window is 0": ({"dms_window_size": 0}, "window must be at least 1"),
    "window is text": ({"dms_window_size": "12"}, "dms_window_size must be a whole number, not '12'"),
    "scale is 0": ({"dms_alpha_scale": 0}, "scale must be positive"),
    "per token": ({"dms_alpha_per": "token"}, "granularity must be 'head' or 'layer'"),
    "separate is text": ({"dms_separate_alpha": "no"}, "dms_separate_alpha must be true or false"),
    "borrowed beside gates": (BORROWED, "says dms_separate_alpha false, but the files have gates"),
    "another family": ({"model_type": "gemma"}, "gemma model; those of llama"),
    "FP8": ({"quantization_config": {"quant_method": "fp8"}}, "fp8.*without -FP8"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_impossible_configurations_are_refused(tmp_path, case):
    changes, words = CONFIGS[case]
    model = base("llama")
    folder, _, _ = publish(tmp_path / "p", model, gate_state(model), **changes)
    for read in (load_adapter, lambda it: octavo.load(it, device="cpu")):
        with pytest.raises((AdapterFileError, UnsupportedModelError), match=words) as caught:
            read(folder)
        assert str(folder) in str(caught.value)


def lose_one(state):
    del state[f"{GATE}.weight"]


def lose_a_norm(state):
    del state[f"{GATE}_norm.weight"]


def lose_a_bias(state):
    state["model.layers.0.self_attn.dms_proj_alpha.bias"] = torch.zeros(2)


def lose_all(state):
    for name in [name for name in state if "dms_" in name]:
        del state[name]


def widen(state):
    state[f"{GATE}.weight"] = torch.ones(6, 96)


def spoil(state):
    state[f"{GATE}_norm.weight"][3] = torch.nan


def add(state):
    state[f"{GATE}_extra.weight"] = torch.ones(3)


HARMS = {
    lose_one: r"lacks 1 of 10 tensors: model\.layers\.1\.self_attn\.dms_proj_alpha\.weight",
    lose_a_norm: r"lacks 1 of 10 tensors: .*layers\.1\.self_attn\.dms_proj_alpha_norm\.weight",
    lose_a_bias: r"lacks 2 of 13 tensors: .*layers\.1\.self_attn\.dms_proj_alpha\.bias",
    lose_all: r"lacks 6 of 10 tensors",
    widen: r"dms_proj_alpha\.weight must be finite with shape \(2, 96\), not \(6, 96\)",
    spoil: r"dms_proj_alpha_norm\.weight must be finite",
    add: r"unknown tensors of gates: .*dms_proj_alpha_extra",
}


@pytest.mark.parametrize("harm", HARMS)
def test_missing_wrong_and_unknown_tensors_are_refused(tmp_path, harm):
    model = base("llama")
    folder, state, _ = publish(tmp_path / "p", model, gate_state(model))
    harm(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match=HARMS[harm]):
        load_adapter(folder)


def test_files_that_hold_gates_are_the_only_ones_that_are_fetched(tmp_path):
    model = base("llama")
    folder, state, _ = publish(tmp_path / "p", model, gate_state(model))
    assert files_needed(folder) == ["model.safetensors"]
    wanted = {n for n in state if "dms_" in n or n.endswith("input_layernorm.weight") or n == "model.norm.weight"}
    where = {name: f"{'gates' if name in wanted else 'rest'}.safetensors" for name in state}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert files_needed(folder) == ["gates.safetensors"]
    (folder / "rest.safetensors").unlink()
    assert [each.name for each in find_adapters("auto", folder)] == ["p"]


def test_what_the_layout_cannot_say_is_not_written(tmp_path):
    model = tiny_model()
    with pytest.raises(ConfigError, match="gates must be made with shift 1"):
        save_published(model, tiny_adapter(model), tmp_path / "out")
    adapter = tiny_adapter(model, shift=1)
    with pytest.raises(AdapterMismatchError, match="SwiftKV"):
        save_published(model, replace(adapter, made_on={"kv_layers": 1}), tmp_path / "out")
    with pytest.raises(AdapterMismatchError):
        save_published(tiny_model(hidden_size=48), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    adapter.gates.input_scale.fill_(2.0)
    save_published(model, adapter, tmp_path / "out")
    written = load_adapter(tmp_path / "out").gates
    assert torch.equal(written.weight, adapter.gates.folded_state()["weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dms_paged_attention_block_size"] == 16
