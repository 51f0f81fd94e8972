"""Finding adapters: by name, folder and hub id, alone and together; without a network."""

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import octavo
from octavo.attachment import attachment_of
from octavo.attachment.adapters import is_hub_id, load_adapter, resolve
from octavo.attachment.supported import fingerprint
from octavo.dms import Adapter
from octavo.errors import AdapterFileError, ConfigError, ModelNotFoundError
from octavo.models import find_adapters, load, load_plain
from octavo.swiftkv import SwiftKVAdapter, initial, save_swiftkv_adapter
from published import logits, publish, transformed
from tiny import tiny_adapter, tiny_model


@pytest.fixture
def folders(tmp_path):
    """A transform in `skip`, with gates of its own in `skip/dms-8x`; other gates in `plain`."""
    model = tiny_model()
    gates = tiny_adapter(model)
    transform = initial(model, 1, 2)
    save_swiftkv_adapter(SwiftKVAdapter("skip", transform, fingerprint(model)), tmp_path / "skip")
    octavo.save_adapter(Adapter("on skip", gates.gates, gates.fingerprint, 2.0), tmp_path / "skip" / "dms-8x")
    octavo.save_adapter(gates, tmp_path / "plain")
    return tmp_path


def test_adapters_are_found_alone_and_together(folders, monkeypatch):
    monkeypatch.chdir(folders)

    def names(adapters, model="some/model"):
        return [adapter.name for adapter in find_adapters(adapters, model)]

    gates = octavo.load_adapter("plain")
    assert isinstance(gates, Adapter)
    assert isinstance(octavo.load_adapter(folders / "skip"), SwiftKVAdapter)
    assert names(None) == names([]) == []
    assert names("dms-8x") == names("auto", None) == ["dms-8x"]
    assert names("auto", folders / "skip") == []
    assert names("skip") == ["skip"]
    assert names([folders / "skip", gates]) == names("skip+plain") == names(" skip + plain ") == ["skip", "tiny"]
    assert names("skip+dms-8x") == names(("skip", "dms-8x")) == ["skip", "on skip"]
    assert names(["dms-8x", "skip"]) == ["on skip", "skip"]
    assert names("skip/dms-8x") == ["on skip"]
    (folders / "skip").rename("a+b")
    assert names("a+b") == ["skip"]
    assert names(["a+b", "plain"]) == ["skip", "tiny"]


def test_adapters_that_cannot_be_together_or_are_none_are_refused(folders, monkeypatch):
    monkeypatch.chdir(folders)
    with pytest.raises(ConfigError, match="two sets of DMS gates for one model, dms-8x and tiny"):
        find_adapters("dms-8x+plain")
    with pytest.raises(ConfigError, match="two SwiftKV transforms for one model, skip and skip"):
        find_adapters(["skip", "skip"])
    for empty in ("", " ", "+", "skip+", ["skip", ""]):
        with pytest.raises(ConfigError, match="has an empty adapter name"):
            find_adapters(empty)
    with pytest.raises(ConfigError, match="not 8"):
        find_adapters(["skip", 8])
    with pytest.raises(AdapterFileError, match=r"no adapter folder nowhere; shipped adapters are .*dms-8x"):
        find_adapters("skip+nowhere")
    (folders / "plain" / "adapter.json").write_text('{"kind": "lora"}')
    with pytest.raises(AdapterFileError, match="kind 'lora'; expected dms or swiftkv"):
        find_adapters("plain")
    (folders / "skip" / "adapter.json").unlink()
    with pytest.raises(AdapterFileError, match="cannot read adapter skip"):
        find_adapters("skip")


def test_both_kinds_are_attached_by_load(folders):
    model = tiny_model()
    model.save_pretrained(folders / "m")
    load_plain(device="cpu")[1].save_pretrained(folders / "m")
    loaded, _ = load(folders / "m", folders / "skip", device="cpu", dtype=torch.float32, chunk=99)
    attachment = attachment_of(loaded)
    assert (attachment.adapter, attachment.swiftkv.name, attachment.settings.chunk) == (None, "skip", 99)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("Snowflake/Llama-3.1-SwiftKV-8B", True), ("dms-8x", False), ("./a", False), ("/a/b", False), ("a/b/c", False)],
)
def test_hub_ids_are_told_by_their_form(name, is_one):
    assert is_hub_id(name) is is_one


def test_gates_beside_it_come_first(tmp_path):
    """A name given together with a SwiftKV adapter means what lies in that adapter's folder."""
    model = tiny_model()
    folder = publish(tmp_path / "p", model, transformed(model))
    octavo.save_adapter(tiny_adapter(model), folder / "dms-8x")
    for asked in ([folder, "dms-8x"], ["dms-8x", str(folder)], f"{folder}+dms-8x"):
        assert sorted(a.name for a in resolve(asked)) == ["p", "tiny"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache that is all there is, without a network; gives the folder of a repository in it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def repository(name: str) -> Path:
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots").mkdir()
        return place / "snapshots" / ("0" * 40)

    return repository


def test_a_hub_id_is_a_model_and_an_adapter(hub, smollm):
    model = tiny_model()
    adapter = transformed(model, 2)
    folder = publish(hub("some/Llama-SwiftKV"), model, adapter, shards=2)
    smollm[1].save_pretrained(folder)
    expected = logits(octavo.attach(model, adapter))
    assert torch.equal(logits(octavo.attach(model, "some/Llama-SwiftKV")), expected)
    whole, _ = octavo.load("some/Llama-SwiftKV", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(whole), expected)
    assert attachment_of(whole).swiftkv.name == "some/Llama-SwiftKV"


def test_an_adapter_folder_may_lie_on_the_hub(hub):
    model = tiny_model()
    octavo.save_swiftkv_adapter(transformed(model, 2), hub("some/adapter"))
    assert attachment_of(octavo.attach(model, "some/adapter")).swiftkv.name == "ours"


def test_gates_inside_a_hub_repository_are_found(folders, tmp_path, monkeypatch):
    """As `octavo retrofit swiftkv+dms` lays them out; each file is fetched by a pattern that matches it."""
    local = tmp_path / "local"

    def snapshot_download(name, allow_patterns):
        assert name == "some/pair"
        for path in (folders / "skip").rglob("*"):
            file = path.relative_to(folders / "skip")
            if any(fnmatch(str(file), pattern) for pattern in allow_patterns):
                (local / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / file)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for asked in ("some/pair+dms-8x", ["dms-8x", "some/pair"]):
        assert sorted(a.name for a in resolve(asked)) == ["on skip", "skip"]


def test_only_files_with_the_transform_are_fetched(tmp_path, monkeypatch):
    model = tiny_model()
    remote = publish(tmp_path / "remote", model, transformed(model), shards=9)
    local, asked = tmp_path / "local", []
    local.mkdir()

    def snapshot_download(name, allow_patterns):
        assert name == "some/Llama-SwiftKV"
        asked.extend(allow_patterns)
        for file in allow_patterns:
            if (remote / file).is_file():
                shutil.copy(remote / file, local / file)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_adapter("some/Llama-SwiftKV")
    got = {file for file in asked if file.startswith("model-")}
    needed = set()
    for file in remote.glob("model-*"):
        with safe_open(file, "pt") as tensors:
            if any("swiftkv" in name or name == "model.norm.weight" for name in tensors.keys()):  # noqa: SIM118
                needed.add(file.name)
    assert got == needed
    assert len(got) < 9


def test_a_failing_download_is_one_clear_line(monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("We couldn't connect\nto anything at all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    monkeypatch.setattr(sys.modules["octavo.models.load"], "hf_hub_download", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterFileError, match=r"some/Llama-SwiftKV.*We couldn't connect") as caught:
        octavo.attach(tiny_model(), "some/Llama-SwiftKV")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelNotFoundError, match="some/Llama-SwiftKV") as caught:
        octavo.load("some/Llama-SwiftKV")
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_hides_no_shipped_one(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "dms-8x").mkdir()
    (folders / "mine").mkdir()
    assert load_adapter("dms-8x").name == "dms-8x"
    with pytest.raises(AdapterFileError, match="cannot read adapter mine"):
        load_adapter("mine")
    octavo.save_adapter(octavo.load_adapter("plain"), folders / "dms-16x")
    assert load_adapter("dms-16x").name == "tiny"
