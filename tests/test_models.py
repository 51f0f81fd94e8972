"""Finding and loading models and adapters."""

from pathlib import Path

import pytest
import torch

import octavo
from octavo.attachment import attachment_of
from octavo.dms import Adapter
from octavo.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from octavo.finding import SHIPPED, load_adapter, shipped_adapters
from octavo.models import default_model, load, load_plain, unpacked_gguf
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


def test_a_broken_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelNotFoundError, match=r"x\.gguf"):
        load(tmp_path / "x.gguf")


def test_shipped_adapters_are_whole_and_gates_are_small():
    assert {"dms-16x", "dms-8x"} <= set(shipped_adapters())
    for name in shipped_adapters():
        adapter = load_adapter(name)
        assert adapter.name == name
        if isinstance(adapter, Adapter):
            rows = adapter.card["evaluation"]["rows"]
            assert rows[0]["policy"] == "dense"
            assert sum(f.stat().st_size for f in (SHIPPED / name).iterdir()) < 300_000


def test_adapters_that_do_not_exist_or_fit_are_refused():
    with pytest.raises(AdapterFileError, match="dms-16x, dms-8x"):
        load_adapter("dms-99x")
    model = tiny_model()
    with pytest.raises(AdapterMismatchError):
        octavo.attach(model, load_adapter("dms-8x"))
    with pytest.raises(UnsupportedModelError):
        octavo.attach("a string")
