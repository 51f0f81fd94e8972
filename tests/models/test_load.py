"""Finding and loading models and adapters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.attachment import attachment_of
from octavo.attachment.adapters import SHIPPED, load_adapter, shipped_adapters
from octavo.dms import Adapter
from octavo.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from octavo.models import default_model, load, load_plain, save_published
from octavo.models.gguf import unpacked_gguf
from published import publish, transformed
from tiny import tiny_adapter, tiny_model


def test_default_model_comes_with_its_adapter():
    model, tokenizer = octavo.load(device="cpu")
    attachment = attachment_of(model)
    assert attachment.adapter.name == "dms-8x"
    assert tokenizer.decode(tokenizer("two words")["input_ids"]) == "two words"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert not model.training


def test_embedded_tokenizer_is_the_published_one():
    """Ids that the SmolLM2 tokenizer is known to give: digits apart, newlines and unknown scripts kept."""
    _, tokenizer = load_plain(device="cpu")
    text = "Hello world 1234 don't\n\n  naïve — 中文<|im_start|>user\nx<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[:7] == [19556, 905, 216, 33, 34, 35, 36]
    assert ids[-5:] == [1, 4093, 198, 104, 2]


def test_unpacking_happens_once():
    path = Path(default_model())
    folder = unpacked_gguf(path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpacked_gguf(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_folder_is_loaded_and_attached(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    _, tokenizer = load_plain(device="cpu")
    tokenizer.save_pretrained(tmp_path / "m")
    octavo.save_adapter(tiny_adapter(model), tmp_path / "a")
    loaded, _ = load(tmp_path / "m", tmp_path / "a", device="cpu", dtype=torch.float32, chunk=99)
    assert attachment_of(loaded).settings.chunk == 99
    assert attachment_of(loaded).adapter.name == "tiny"
    plain, _ = load(tmp_path / "m", device="cpu")
    assert attachment_of(plain).adapter is None


@pytest.mark.parametrize("name", ["no/such-folder-anywhere", "missing.gguf", "/nonexistent"])
def test_missing_models_are_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=name) as caught:
        load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/nonexistent", "./nonexistent", "models/here/nonexistent", "~/nonexistent"])
def test_a_folder_that_is_not_there_is_called_so(name):
    with pytest.raises(ModelNotFoundError, match=f"{name}: there is no such folder"):
        load(name)


def test_a_broken_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelNotFoundError, match=r"x\.gguf"):
        load(tmp_path / "x.gguf")


def test_shipped_adapters_are_whole_and_gates_are_small():
    assert {"dms-16x", "dms-8x", "dms-5x"} <= set(shipped_adapters())
    for name in shipped_adapters():
        adapter = load_adapter(name)
        assert adapter.name == name
        if isinstance(adapter, Adapter):
            if "suite" in adapter.card:
                columns = adapter.card["suite"]["columns"]
                assert columns[1] == "dense"
                assert name in columns
            else:
                assert adapter.card["evaluation"]["rows"][0]["policy"] == "dense"
            assert sum(f.stat().st_size for f in (SHIPPED / name).iterdir()) < 300_000


def test_adapters_that_do_not_exist_or_fit_are_refused():
    with pytest.raises(AdapterFileError, match="dms-16x, dms-16x-v1, dms-16x-v2, dms-5x, dms-8x"):
        load_adapter("dms-99x")
    model = tiny_model()
    with pytest.raises(AdapterMismatchError):
        octavo.attach(model, load_adapter("dms-8x"))
    with pytest.raises(UnsupportedModelError):
        octavo.attach("a string")


@pytest.fixture
def tokenizer(smollm):
    return smollm[1]


@pytest.fixture
def folder(tmp_path, tokenizer):
    tiny_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change_config(folder, settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_not_missing(tmp_path, tokenizer, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded, _ = load_plain(tmp_path, device="cpu", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_model_that_lacks_tensors_is_refused(folder, lost):
    state = load_file(folder / "model.safetensors")
    del state[lost]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=f"it lacks 1 of the model's tensors: {lost}"):
        load_plain(folder, device="cpu")


BAD_SETTINGS = [
    ({"hidden_size": 48}, "gives other shapes than its files to 30 of .*lm_head.weight"),
    ({"hidden_size": "x"}, "'hidden_size' expected int"),
    ({"hidden_act": "foo"}, "KeyError: 'foo'"),
    ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "KeyError: 'foo'"),
    ({"num_attention_heads": 0}, "ZeroDivisionError"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_a_config_that_cannot_be_is_one_clear_line(folder, settings, message):
    change_config(folder, settings)
    with pytest.raises(ModelNotFoundError, match=f"cannot load model .*{message}") as caught:
        load_plain(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"hidden_act": "foo"}, {"rope_scaling": {"rope_type": "foo"}}, {"intermediate_size": 48}]
)
def test_a_published_config_that_cannot_be_is_one_clear_line(tmp_path, tokenizer, settings):
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model), **settings)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelNotFoundError, match="cannot load model") as caught:
        load_plain(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["foo", "xpu", "cuda:99"])
def test_devices_that_are_not_there_are_refused(device):
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
        load_plain(device=device)


def test_a_gguf_that_cannot_be_unpacked_says_where(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("octavo.models.gguf.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match=r"cannot unpack .*set HF_HOME"):
        unpacked_gguf(Path(default_model()))


def test_a_checkpoint_is_written_into_the_folder_one_stands_in(tmp_path, monkeypatch):
    model = tiny_model()
    for shard in ("abc", "GB"):
        with pytest.raises(ConfigError, match="shard must be"):
            save_published(model, transformed(model), tmp_path / "a", shard=shard)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    save_published(model, transformed(model), ".")
    assert (tmp_path / "b" / "config.json").is_file()
