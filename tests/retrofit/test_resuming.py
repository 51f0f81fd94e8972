"""Checkpoints and logs of a run: what resumes, what is refused and how it is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from octavo.errors import OutputFileError, RetrofitError
from octavo.retrofit.checkpoint import CHECKPOINT, LOG, read_log, write_log
from octavo.retrofit.data import Source
from octavo.retrofit.settings import GateSettings, RetrofitSettings
from octavo.retrofit.trainer import Retrofit
from tiny import tiny_adapter, tiny_model

SETTINGS = RetrofitSettings(GateSettings(target=3, window=8), steps=2, batch=1, micro_batch=1, length=32, recall=0.0)
TEXT = Source("text", np.random.default_rng(0).integers(2, 97, 200).astype(np.uint16), None, 1.0)


def prepared(folder, model=None, sources=(TEXT,), settings=SETTINGS, init=()) -> Retrofit:
    return Retrofit(model or tiny_model(), None, list(sources), settings, folder, init=init)


@pytest.fixture
def folder(tmp_path):
    """That of a finished run, which started from an adapter."""
    prepared(tmp_path, init=[tiny_adapter(tiny_model(), window=8)]).run()
    return tmp_path


def other_norms():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    return model


OTHERS = {
    "settings.seed 0, now 1": lambda: {"settings": replace(SETTINGS, seed=1)},
    "model.norms [1.0,": lambda: {"model": other_norms()},
    "model.model_type llama, now qwen2": lambda: {"model": tiny_model("qwen2"), "plain": True},
    "init.gates tiny, now None": lambda: {"plain": True},
    "data.source 1.tokens 200, now 100": lambda: {"sources": [replace(TEXT, tokens=TEXT.tokens[:100])]},
    "data.source 1.share 1.0, now 0.5": lambda: {"sources": [replace(TEXT, share=0.5)]},
    "data.source 2 None, now {": lambda: {"sources": [TEXT, replace(TEXT, name="more")]},
    "dtype float32, now bfloat16": lambda: {"model": tiny_model().bfloat16()},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_only_the_same_run_resumes_and_what_differs_is_named(difference, folder):
    changes = OTHERS[difference]()
    model = changes.pop("model", tiny_model())
    init = [] if changes.pop("plain", False) else [tiny_adapter(model, window=8)]
    with pytest.raises(RetrofitError) as caught:
        prepared(folder, model, init=init, **changes).resume()
    assert f"other settings: {difference}" in str(caught.value) or f"; {difference}" in str(caught.value)
    if "model_type" not in difference:
        assert str(caught.value).count(", now ") == 1, "nothing that is equal is named"


def rewritten(path, change) -> None:
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    metadata = change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


DAMAGES = {
    "no metadata": lambda metadata, tensors: None,
    "no step": lambda metadata, tensors: {**metadata, "step": "two"},
    "bad JSON": lambda metadata, tensors: {**metadata, "settings": "{"},
    "a tensor missing": lambda metadata, tensors: tensors.pop("gates.bias") is None or metadata,
    "another shape": lambda metadata, tensors: tensors.update({"gates.bias": torch.zeros(7)}) or metadata,
    "no moments": lambda metadata, tensors: [tensors.pop(n) for n in [*tensors] if "adam." in n] and metadata,
    "one moment": lambda metadata, tensors: tensors.pop("adam.gates.bias.exp_avg") is None or metadata,
    "moment of another shape": lambda metadata, tensors: (
        tensors.update({"adam.gates.bias.exp_avg": torch.zeros(7)}) or metadata
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage, folder):
    rewritten(folder / CHECKPOINT, DAMAGES[damage])
    with pytest.raises(RetrofitError, match="which is damaged"):
        prepared(folder, init=[tiny_adapter(tiny_model(), window=8)]).resume()


def test_checkpoints_of_before_exercises_and_shift_resume(folder):
    def older(metadata, tensors):
        settings = json.loads(metadata["settings"])
        assert settings.pop("exercises") == 0
        assert settings["gates"].pop("shift") == 0
        return {**metadata, "settings": json.dumps(settings)}

    rewritten(folder / CHECKPOINT, older)
    run = prepared(folder, init=[tiny_adapter(tiny_model(), window=8)])
    run.resume()
    assert run.step == 2


def test_broken_and_missing_checkpoints_are_refused(folder):
    path = folder / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RetrofitError, match=r"cannot resume.*damaged"):
        prepared(folder).resume()
    with pytest.raises(RetrofitError, match="cannot resume: there is no"):
        prepared(folder / "nothing").resume()


@pytest.mark.parametrize("content", [None, "", "{", "1\n2\n", '{"step": 1, "loss": 1, "kl": 1}\n', '{"step": 2}\n' * 2])
def test_a_log_with_missing_or_damaged_lines_is_refused(content, folder):
    (folder / LOG).unlink() if content is None else (folder / LOG).write_text(content)
    with pytest.raises(RetrofitError, match=r"log\.jsonl does not hold one line for each of the steps 1 to 2"):
        prepared(folder, init=[tiny_adapter(tiny_model(), window=8)]).resume()


def test_lines_past_the_checkpoint_are_dropped(folder):
    with (folder / LOG).open("a") as f:
        f.write('{"step": 3, "lo')  # torn by a crash
    prepared(folder, init=[tiny_adapter(tiny_model(), window=8)]).resume()
    assert [line["step"] for line in read_log(folder, 2)] == [1, 2]
    assert len((folder / LOG).read_text().splitlines()) == 2


@pytest.mark.parametrize("name", [CHECKPOINT, CHECKPOINT + ".new", LOG])
def test_what_cannot_be_written_is_an_octavo_error(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(OutputFileError, match=r"cannot write .*" + name.removesuffix(".new")):
        prepared(tmp_path).run()


def test_the_first_step_begins_the_log_anew(tmp_path):
    for step in (1, 2, 1):
        write_log(tmp_path, {"step": step, "loss": 0.0, "kl": 0.0})
    assert [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()] == [1]
