"""Published checkpoints: tiny models in exactly the published layout, read and written; every broken one refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.attachment import attachment_of
from octavo.attachment.adapters import load_adapter, load_published
from octavo.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ConfigError,
    ModelNotFoundError,
    OutputFileError,
    UnsupportedModelError,
)
from octavo.models import load_plain
from octavo.swiftkv.checkpoint import is_published, read_published
from published import K1, NORM, Q2, V2, by_hand, logits, publish, transformed
from tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def tokenizer(smollm):
    return smollm[1]


def loaded(folder: Path, tokenizer, adapter="auto", **options):
    tokenizer.save_pretrained(folder)
    return octavo.load(folder, adapter, device="cpu", **{"dtype": torch.float32, **options})[0]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_published_folder_is_read(tmp_path, family, group, shards):
    model = tiny_model(family)
    adapter = transformed(model, group)
    folder = publish(tmp_path / "p", model, adapter, shards=shards)
    assert is_published(folder)
    published = load_published(folder)
    assert published.name == "p"
    assert published.transform.spec == adapter.transform.spec
    assert published.fingerprint == adapter.fingerprint
    ours = dict(adapter.transform.named_parameters())
    theirs = dict(published.transform.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("family", "group", "tied"), [("llama", 1, False), ("llama", 2, True), ("qwen2", 2, True)])
def test_it_is_a_model_of_its_own(tmp_path, tokenizer, caplog, capfd, family, group, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    adapter = transformed(model, group)
    folder = publish(tmp_path / "p", model, adapter, shards=2)
    base = logits(model)
    expected = logits(octavo.attach(model, adapter))
    whole = loaded(folder, tokenizer)
    assert type(whole) is type(model)
    assert whole.config.model_type == family
    assert not hasattr(whole.config, "num_key_value_layers")
    assert torch.equal(logits(whole), expected)
    assert not torch.allclose(base, expected, atol=1e-2)
    assert torch.equal(logits(octavo.set_swiftkv(whole, False)), base)
    assert torch.equal(logits(octavo.detach(whole)), base)
    assert torch.equal(logits(loaded(folder, tokenizer, None)), base)
    heard = caplog.text + "".join(capfd.readouterr())
    assert "swiftkv" not in heard.lower()
    assert "unexpected" not in heard.lower()


def test_dtype_is_respected(tmp_path, tokenizer):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    half = loaded(folder, tokenizer, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(half)).all()
    assert attachment_of(half).swiftkv is not None


def test_it_is_an_adapter_for_its_base_model(tmp_path):
    model = tiny_model()
    adapter = transformed(model, 2)
    folder = publish(tmp_path / "p", model, adapter)
    expected = logits(octavo.attach(model, adapter))
    assert torch.equal(logits(octavo.attach(model, str(folder))), expected)
    assert torch.equal(logits(octavo.attach(model, octavo.load_adapter(folder))), expected)
    near, far = tiny_model(), tiny_model()
    near.base_model.norm.weight.data *= 1.02
    octavo.attach(near, folder)
    far.base_model.norm.weight.data *= 2
    with pytest.raises(AdapterMismatchError):
        octavo.attach(far, folder)


@pytest.mark.parametrize(("family", "group", "tied"), [("llama", 1, True), ("qwen2", 2, False)])
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_written_is_read(tmp_path, tokenizer, family, group, tied, shard):
    model = tiny_model(family, tie_word_embeddings=tied)
    adapter = transformed(model, group)
    expected = logits(octavo.attach(model, adapter))
    octavo.save_published(model, adapter, tmp_path / "out", tokenizer, shard=shard)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (shard == "60KB")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole, words = octavo.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(whole), expected)
    assert words("harbour")["input_ids"] == tokenizer("harbour")["input_ids"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = {
        "model_type": f"{family}_swiftkv",
        "swiftkv": True,
        "num_key_value_layers": 1,
        "key_value_group_size": group,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in published} == published


def test_a_norm_s_epsilon_in_float32_is_no_other_model(tmp_path):
    """As GGUF files give it, and as the embedded default therefore has it."""
    model = tiny_model(rms_norm_eps=9.999999747378752e-06)
    adapter = transformed(model)
    octavo.save_published(model, adapter, tmp_path / "out")
    expected = logits(octavo.attach(model, adapter))
    assert torch.equal(logits(octavo.attach(model, tmp_path / "out")), expected)


def test_the_writer_uses_the_published_names_and_no_others(tmp_path):
    model = tiny_model("qwen2")
    adapter = transformed(model, 2)
    octavo.save_published(model, adapter, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == model.state_dict().keys() | by_hand(adapter).keys()
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in by_hand(adapter).items())
    again = load_published(tmp_path / "out")
    assert again.transform.norm.dtype == torch.float32


def test_scaled_rope_is_written_as_others_read_it(tmp_path, tokenizer):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    model = tiny_model(rope_parameters=rope)
    adapter = transformed(model)
    octavo.save_published(model, adapter, tmp_path / "out", tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, {"rope_type": "linear", "factor": 4.0})
    whole, _ = octavo.load(tmp_path / "out", None, device="cpu", dtype=torch.float32)
    assert torch.equal(logits(whole), logits(octavo.attach(model)))


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_families_without_a_published_layout_are_named(tmp_path, family):
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=f"{family}.*only for llama and qwen2"):
        octavo.save_published(model, transformed(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused(tmp_path):
    model = tiny_model()
    adapter = transformed(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for place in (tmp_path / "full", tmp_path / "full" / "x", tmp_path / "full" / "x" / "y"):
        with pytest.raises(OutputFileError, match="cannot write checkpoint"):
            octavo.save_published(model, adapter, place)
    with pytest.raises(AdapterMismatchError):
        octavo.save_published(tiny_model(hidden_size=48), adapter, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    octavo.save_published(model, adapter, tmp_path / "empty")
    assert is_published(tmp_path / "empty")


CONFIGS = {
    "K is 0": ({"num_key_value_layers": 0}, AdapterFileError, r"1\.\.2 .* not 0"),
    "K too large": ({"num_key_value_layers": 3}, AdapterFileError, r"1\.\.2 .* not 3"),
    "K missing": ({"num_key_value_layers": "absent"}, AdapterFileError, "num_key_value_layers must be"),
    "K null": ({"num_key_value_layers": None}, AdapterFileError, "num_key_value_layers must be"),
    "group does not divide": ({"key_value_group_size": 3}, AdapterFileError, "groups of 3 do not divide"),
    "group is text": ({"key_value_group_size": "2"}, AdapterFileError, "key_value_group_size must be"),
    "width is text": ({"hidden_size": "many"}, AdapterFileError, "hidden_size|config.json"),
    "FP8": ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModelError, "fp8.*without -FP8"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_impossible_configurations_are_refused(tmp_path, case):
    settings, error, words = CONFIGS[case]
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model), **settings)
    with pytest.raises(error, match=words):
        load_adapter(folder)
    with pytest.raises(error, match=words):
        octavo.load(folder, device="cpu")


def test_quantised_checkpoints_are_refused_without_their_transform_too(tmp_path):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model), quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="FP8"):
        load_plain(folder, device="cpu")


def test_fp8_tensors_are_refused(tmp_path):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(state, file)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.weight is of dtype FP8"):
        load_adapter(folder)


def change_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_counted_and_named(tmp_path):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    change_tensors(folder, lambda s: [s.pop(n) for n in (NORM, f"{Q2}.weight", f"{K1}.weight", f"{V2}.weight")])
    with pytest.raises(AdapterFileError, match=rf"lacks 4 of 8 tensors: {NORM}, {Q2}\.weight, {K1}\.weight, \.\.\."):
        load_adapter(folder)


def test_a_base_model_that_is_not_whole_is_named(tmp_path, tokenizer):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    change_tensors(folder, lambda s: s.pop("model.layers.2.self_attn.k_proj.weight"))
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 .*: model\.layers\.2\.self_attn\.k_proj\.weight$"):
        loaded(folder, tokenizer)
    change_tensors(folder, lambda s: s.update({"model.layers.2.self_attn.k_proj.weight": torch.ones(3, 3)}))
    with pytest.raises(ModelNotFoundError, match="cannot load model") as caught:
        loaded(folder, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.ones(3), torch.full((96,), torch.nan)])
def test_tensors_of_wrong_shape_or_value_are_refused(tmp_path, value):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    change_tensors(folder, lambda s: s.update({NORM: value}))
    with pytest.raises(AdapterFileError, match=rf"{NORM} must be finite with shape \(96,\)"):
        load_adapter(folder)


def break_json(folder):
    (folder / "config.json").write_text("{")


def other_type(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_index(folder):
    no_weights(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def missing_shard(folder):
    state = load_file(folder / "model.safetensors")
    no_weights(folder)
    where = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("harm", [break_json, other_type, truncate, no_weights, broken_index, missing_shard])
def test_broken_folders_are_refused(tmp_path, harm):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    harm(folder)
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(AdapterFileError):
        read_published(folder)


def test_export_is_a_command(tmp_path, tokenizer):
    from typer.testing import CliRunner

    from octavo.cli import main as cli

    model = tiny_model("qwen2")
    adapter = transformed(model)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    octavo.save_swiftkv_adapter(adapter, tmp_path / "a", "fp32")
    gates = tiny_adapter(model, shift=1)
    octavo.save_adapter(gates, tmp_path / "gates")

    def export(name, *options, out="out"):
        arguments = ["export", str(tmp_path / out), "--model", str(tmp_path / "m"), "--adapter", str(tmp_path / name)]
        return CliRunner().invoke(cli.app, [*arguments, *options])

    assert isinstance(export("gates", "--layout", "arctic").exception, ConfigError)
    assert isinstance(export("a", "--layout", "nvidia").exception, ConfigError)
    done = export("a")
    assert done.exit_code == 0, done.exception
    whole, _ = octavo.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(whole), logits(octavo.attach(model, adapter)))
    assert isinstance(export("a").exception, OutputFileError)
    done = export("gates", "--layout", "nvidia", out="dms")
    assert done.exit_code == 0, done.exception
    whole, _ = octavo.load(tmp_path / "dms", device="cpu", dtype=torch.float32)
    assert torch.equal(attachment_of(whole).adapter.gates.weight, gates.gates.weight)
    assert torch.equal(logits(whole), logits(octavo.attach(model, gates)))
