"""`octavo models`: what a walk has found, and what `attach` would do with a model by its configuration alone."""

import json

import pytest
from typer.testing import CliRunner

from octavo import attach
from octavo.cli.main import app
from octavo.errors import ModelNotFoundError, UnsupportedModelError
from octavo.models.listing import foresee, walked
from tiny_decoders import tiny_config, tiny_decoder

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments):
    result = CliRunner().invoke(app, ["models", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def saved(kind, folder):
    tiny_config(kind).save_pretrained(folder)
    return folder / "config.json"


FACTS = {
    "gemma3_text": "of these with a window: 4 with a window of 12",
    "qwen3_next": "layers that keep keys: 1, of 2 KV heads of 16",
    "gpt_oss": "softcapping or sinks: yes",
    "lfm2": "layers with a state of their own: 2",
}


@pytest.mark.parametrize("kind", FACTS)
def test_what_would_be_attached_is_told_without_weights(kind, tmp_path):
    config = saved(kind, tmp_path)
    code, said = run(config)
    assert (code, FACTS[kind] in said) == (0, True), said
    assert f"{type(tiny_decoder(kind)).__name__}: octavo.attach takes it" in said
    assert run(tmp_path) == (code, said)


def test_the_default_is_the_embedded_model_and_no_hub_is_asked(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *address: pytest.fail("it asks a hub"))
    code, said = run("default")
    assert code == 0
    assert said.startswith("LlamaForCausalLM: octavo.attach takes it layers that keep keys: 30, of 3 KV heads of 64")


@pytest.mark.parametrize("kind", ["bloom", "minicpm3", "bert"])
def test_what_would_be_refused_is_told_with_the_reason_that_attach_gives(kind, tmp_path):
    code, said = run(saved(kind, tmp_path))
    with pytest.raises(UnsupportedModelError) as caught:
        attach(tiny_decoder(kind))
    assert code == 1
    assert said == f"octavo.attach refuses it: {' '.join(str(caught.value).split())}"


def test_layers_that_need_numbers_are_told_by_their_class(tmp_path):
    found = foresee(saved("dbrx", tmp_path))  # whose experts ask which tokens come to them
    assert "fails in a trial" in found.refused
    assert found.walked.outcome == "exact"
    assert run(tmp_path)[0] == 0
    assert "octavo.attach takes tiny models of this class" in run(tmp_path)[1]


def test_all_classes_are_listed():
    code, said = run()
    assert code == 0
    exact = sum(each.outcome == "exact" for each in walked())
    assert f"{exact} of {len(walked())} types" in said
    assert "LlamaForCausalLM" in said
    assert "BloomForCausalLM" not in said
    assert "BloomForCausalLM" in run("--refused")[1]


@pytest.mark.parametrize(
    ("name", "reason"), [("nothing here", "cannot read a configuration.*no such folder"), ("a.gguf", "GGUF")]
)
def test_what_is_no_configuration_is_one_error(name, reason, tmp_path):
    with pytest.raises(ModelNotFoundError, match=reason):
        foresee(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "not a multiple"),
        ({"hidden_size": "large"}, "expected int"),
        ({"num_attention_heads": 0}, "by zero"),
    ],
)
def test_impossible_settings_are_one_error(settings, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    with pytest.raises(ModelNotFoundError, match=f"cannot read a configuration .*{reason}"):
        foresee(tmp_path)


def test_code_beside_a_configuration_is_refused_without_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asks"))
    code = {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": code}))
    with pytest.raises(ModelNotFoundError, match="custom code"):
        foresee(tmp_path)
