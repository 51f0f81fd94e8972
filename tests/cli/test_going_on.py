"""`octavo retrofit` into folders that hold adapters, and from adapters: what is kept, taken over and refused."""

import json

import pytest
from typer.testing import CliRunner

from octavo import load_adapter
from octavo.adapter_file import SETTINGS, TENSORS
from octavo.cli import main as cli
from octavo.errors import ConfigError
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from octavo.models import default_model, load_tokenizer

    folder = tmp_path_factory.mktemp("going-on")
    tiny_model(vocab_size=49152, num_hidden_layers=4, layer_types=["full_attention"] * 4).save_pretrained(
        folder / "model"
    )
    load_tokenizer(default_model()).save_pretrained(folder / "model")
    (folder / "t.txt").write_text("It was a quiet harbour town, and nobody knew why. " * 60)
    return folder


@pytest.fixture
def retrofit(place):
    def run(what, out, *more):
        common = ["--model", str(place / "model"), "--data", str(place / "t.txt"), "--no-sampled", "--length", "64",
                  "--steps", "1", "--batch", "1", "--micro-batch", "1", "--recall", "0", "--exercises", "0",
                  "--device", "cpu", "--dtype", "fp32"]  # fmt: skip
        result = CliRunner().invoke(cli.app, ["retrofit", what, str(out), *common, *more])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return run


def test_what_is_in_the_folder_is_not_lost_to_another_kind(retrofit, tmp_path):
    out = tmp_path / "run"
    retrofit("dms", out, "--window", "8")
    kept = (out / TENSORS).read_bytes()
    for what in ("swiftkv", "swiftkv+dms"):
        with pytest.raises(ConfigError, match="holds another kind of adapter"):
            retrofit(what, out, *(["--window", "8"] if "dms" in what else []))
    assert (out / TENSORS).read_bytes() == kept
    retrofit("dms", out, "--window", "8", "--seed", "1")  # the same kind is made anew
    assert (out / TENSORS).read_bytes() != kept


def test_gates_do_not_lose_the_weights_that_they_were_made_on(retrofit, tmp_path):
    out = tmp_path / "both"
    retrofit("swiftkv+dms", out, "--window", "8", "--target", "3")
    kept = (out / TENSORS).read_bytes()
    for what, more in (("swiftkv", []), ("swiftkv+dms", ["--window", "8", "--gates-name", "others"])):
        with pytest.raises(ConfigError, match="dms-3x holds gates that were made on the SwiftKV weights"):
            retrofit(what, out, *more)
    with pytest.raises(ConfigError, match="holds another kind of adapter"):
        retrofit("dms", out, "--window", "8")
    assert (out / TENSORS).read_bytes() == kept
    retrofit("swiftkv+dms", out, "--window", "8", "--target", "3", "--seed", "1")
    assert (out / TENSORS).read_bytes() != kept
    (out / SETTINGS).write_text("{")  # nothing that could be lost
    (out / "dms-3x" / SETTINGS).write_text("{")
    retrofit("swiftkv", out)


def test_gates_go_on_with_the_window_and_the_target_that_they_have(retrofit, tmp_path):
    retrofit("dms", tmp_path / "first", "--window", "9", "--target", "3")
    first = load_adapter(tmp_path / "first")
    for more, window, target in (([], 9, 3.0), (["--window", "7"], 7, 3.0), (["--target", "5"], 9, 5.0)):
        retrofit("dms", tmp_path / "second", "--init", str(tmp_path / "first"), *more)
        second = load_adapter(tmp_path / "second")
        assert (second.gates.spec.eviction.window, second.target) == (window, target)
        assert second.card["init"] == first.name == "first"


def test_gates_inside_say_where_those_that_they_started_from_were_made(retrofit, tmp_path):
    retrofit("swiftkv+dms", tmp_path / "one", "--window", "9", "--target", "3")
    again = ["--init", str(tmp_path / "one"), "--init", "dms-3x"]
    retrofit("swiftkv+dms", tmp_path / "two", *again)
    gates = json.loads((tmp_path / "two" / "dms-3x" / SETTINGS).read_text())
    assert gates["card"]["init"] == "dms-3x, made on one"
    assert (gates["window"], gates["target"]) == (9, 3.0)
    assert "Started from dms-3x, made on one." in (tmp_path / "two" / "dms-3x" / "README.md").read_text()
    retrofit("swiftkv+dms", tmp_path / "three", *again, "--target", "2")
    assert (tmp_path / "three" / "dms-2x" / SETTINGS).exists()
