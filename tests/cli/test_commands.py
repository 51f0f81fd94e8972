"""The commands, run as a user runs them: what they print, and one line with exit code 2 for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from octavo.cli import main as cli
from octavo.errors import OctavoError, OutputFileError, PromptError
from octavo.retrofit.results import Evaluation, EvaluationSettings
from published import publish, transformed
from tiny import tiny_model

runner = CliRunner()
TEXT = "It was a quiet harbour town, and nothing much happened there. " * 60


def run(*arguments: str, **options):
    """In process, so that the tests do not pay for imports each time; errors as `main` sees them."""
    return runner.invoke(cli.app, list(arguments), **options)


def shell(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from octavo.cli.main import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, input=stdin, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_help_names_every_command():
    out = run("--help").stdout
    assert all(name in out for name in ("demo", "chat", "generate", "retrofit", "evaluate"))


def test_generate_answers_and_streams():
    out = run("generate", "What is the capital of France?", "--max-new-tokens", "12", "--device", "cpu")
    assert out.exit_code == 0, out.exception
    assert "Paris" in out.stdout


def test_chat_keeps_its_cache_between_turns(monkeypatch):
    out = run("chat", "--max-new-tokens", "8", "--device", "cpu", input="Hello there.\nAnd again.\n\n")
    assert out.exit_code == 0, out.exception
    counts = [int(line.split(" tokens")[0].replace(",", "")) for line in out.stdout.splitlines() if " B held" in line]
    assert len(counts) == 2
    assert counts[1] > counts[0]


@pytest.mark.parametrize("options", [[], ["--swiftkv"], ["--kv-dtype", "int8"]])
def test_demo_reads_the_user_s_own_text(tmp_path, options):
    (tmp_path / "t.txt").write_text(TEXT + "The harbour master is called Ottilie Brandt. " + TEXT)
    png = tmp_path / "map.png"
    out = run(
        "demo", "--file", str(tmp_path / "t.txt"), "--question", "What is the harbour master called?",
        "--png", str(png), "--device", "cpu", *options,
    )  # fmt: skip
    assert out.exit_code == 0, out.exception
    assert ("prompt tokens skip 10 of 30 layers" in out.stdout) == ("--swiftkv" in options)
    assert ("int8 pages" in out.stdout) == ("int8" in options)
    assert "with Octavo" in out.stdout
    assert "Ottilie" in out.stdout
    assert "head 2 |" in out.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_evaluate_writes_table_json_and_plot(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    out = run(
        "evaluate", str(tmp_path / "t.txt"), "--lengths", "400", "--cases", "2", "--nll-length", "500",
        "--nll-from", "300", "--out", str(tmp_path / "e.json"), "--device", "cpu",
    )  # fmt: skip
    assert out.exit_code == 0, out.exception
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["dense", "dms-8x", "sinks + recent", "key norm", "random"]
    assert f"{rows[1]['nll']:.4f}" in out.stdout
    assert (tmp_path / "e.png").exists()


def test_evaluate_measures_quantised_pages(tmp_path, tiny_folder):
    (tmp_path / "t.txt").write_text(TEXT)
    out = run(
        "evaluate", str(tmp_path / "t.txt"), "--model", str(tiny_folder), "--lengths", "400", "--cases", "2",
        "--nll-length", "500", "--nll-from", "300", "--kv-dtype", "int8", "--chunk", "64", "--dtype", "fp32",
        "--out", str(tmp_path / "e.json"), "--device", "cpu",
    )  # fmt: skip
    assert out.exit_code == 0, out.exception
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["dense fp32", "dense int8"]
    assert rows[1]["nbytes"] < 0.5 * rows[0]["nbytes"]


@pytest.fixture
def tiny_folder(tmp_path):
    from octavo.models import load_plain

    tiny_model(vocab_size=49152).save_pretrained(tmp_path / "model")
    load_plain(device="cpu")[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_retrofit_trains_resumes_and_makes_a_usable_adapter(tmp_path, tiny_folder):
    (tmp_path / "t.txt").write_text(TEXT)
    base = ["--data", str(tmp_path / "t.txt"), "--no-sampled", "--model", str(tiny_folder), "--length", "300",
            "--window", "16", "--batch", "2", "--micro-batch", "2", "--device", "cpu", "--dtype", "fp32"]  # fmt: skip
    out = run("retrofit", "dms", str(tmp_path / "run"), *base, "--steps", "3", "--held-out", str(tmp_path / "t.txt"))
    assert out.exit_code == 0, out.exception
    for name in (
        "adapter.json",
        "adapter.safetensors",
        "README.md",
        "log.jsonl",
        "training.png",
        "checkpoint.safetensors",
    ):
        assert (tmp_path / "run" / name).exists(), name
    card = json.loads((tmp_path / "run" / "adapter.json").read_text())["card"]
    assert card["evaluation"]["rows"][1]["policy"] == "run"
    out = run("retrofit", "dms", str(tmp_path / "run"), *base, "--steps", "3", "--resume")
    assert out.exit_code == 0, out.exception
    said = run(
        "generate", "Hi", "--model", str(tiny_folder), "--adapter", str(tmp_path / "run"), "--max-new-tokens", "3"
    )
    assert said.exit_code == 0, said.exception


def test_chats_are_written_in_the_model_s_words(tmp_path, tiny_folder):
    (tmp_path / "p.jsonl").write_text('{"question": "One?"}\n{"question": "Two, please?"}\n{"question": "Three?"}\n')
    out = run(
        "retrofit", "chats", str(tmp_path / "c.jsonl"), "--prompts", str(tmp_path / "p.jsonl"), "--limit", "2",
        "--batch", "2", "--max-new-tokens", "4", "--device", "cpu",
    )  # fmt: skip
    assert out.exit_code == 0, out.exception
    chats = [json.loads(line)["messages"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {c[0]["content"] for c in chats} == {"One?", "Two, please?"}
    assert all(c[1]["role"] == "assistant" for c in chats)


def test_prompts_are_made_up_where_none_are_given(tmp_path, tiny_folder):
    out = run(
        "retrofit", "chats", str(tmp_path / "c.jsonl"), "--limit", "2", "--batch", "2", "--max-new-tokens", "4",
        "--model", str(tiny_folder), "--device", "cpu",
    )  # fmt: skip
    assert out.exit_code == 0, out.exception
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2


def test_text_is_tokenised_for_elsewhere(tmp_path, tiny_folder):
    (tmp_path / "t.txt").write_text(TEXT)
    where = ["--data", str(tmp_path / "t.txt"), "--model", str(tiny_folder), "--limit", "200"]
    out = run("retrofit", "tokens", str(tmp_path / "t.npy"), *where)
    assert out.exit_code == 0, out.exception
    assert np.load(tmp_path / "t.npy").shape == (200,)


MISTAKES = {
    "no adapter folder": ["generate", "x", "--adapter", "nope"],
    "--swiftkv names": ["demo", "--swiftkv", "--adapter", "dms-8x"],
    "distilled without SwiftKV": ["generate", "x", "--adapter", "swiftkv+dms-16x"],
    "the prompt is empty": ["generate", "   ", "--device", "cpu"],
    "dtype must be": ["generate", "x", "--dtype", "int3"],
    "budget must be": ["generate", "x", "--budget", "0"],
    "holds no page": ["generate", "x", "--budget", "5000"],
    "and its budget is": ["generate", "word " * 500, "--budget", "600000"],
    "8,192 positions": ["generate", "word " * 9000],
    "--question": ["demo", "--file", __file__],
    "cannot read": ["demo", "--file", "/no/such/file.txt", "--question", "x"],
    "cannot write": ["demo", "--png", __file__ + "/no.png"],
    "cannot write to": ["retrofit", "dms", __file__ + "/run", "--data", __file__, "--length", "300", "--window", "9"],
    "cannot write /proc/none": ["evaluate", __file__, "--out", "/proc/none/e.json"],
    "numbers separated by commas": ["evaluate", __file__, "--lengths", "1k"],
    "names the JSON file": ["evaluate", __file__, "--out", "e.png"],
    "seed must lie": ["generate", "x", "--seed", str(2**64)],
    "not Unicode text": ["generate", "caf\udce9", "--device", "cpu"],
    "cannot be used here": ["generate", "x", "--device", "foo"],
    "empty adapter name": ["generate", "x", "--adapter", "dms-8x+"],
    "are needed": ["evaluate", __file__, "--nll-length", "200000"],
    "nll_from": ["evaluate", __file__, "--nll-from", "0"],
    "kv_dtype must be int8": ["evaluate", __file__, "--kv-dtype", "int4"],
    "kv_dtype must be": ["demo", "--kv-dtype", "bf16"],
    "steps must be": ["retrofit", "dms", "run", "--data", __file__, "--steps", "0"],
    "need at least as many": ["retrofit", "dms", "run", "--data", __file__],
    "nothing to train on": ["retrofit", "swiftkv", "run", "--no-sampled"],
    "leave --no-sampled out": ["retrofit", "swiftkv+dms", "run", "--data", "x", "--no-sampled", "--sample-tokens", "9"],
    "hand 0 to 384 numbers": ["retrofit", "swiftkv", "run", "--before", "400", "--device", "cpu"],
    "numbers to the one after it, not 999": [
        "retrofit", "swiftkv", "run", "--before", "999", "--search", "--held-out", __file__, "--device", "cpu"
    ],
    "this run trains K=20, groups of 1 and before=3": [
        "retrofit", "swiftkv+dms", "run", "--before", "3", "--init", "swiftkv", "--device", "cpu"
    ],
    "--sample-tokens must be": ["retrofit", "dms", "run", "--sample-tokens", "0"],
    "cannot read /no/such.txt": ["retrofit", "dms", "run", "--data", __file__, "--held-out", "/no/such.txt"],
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_every_mistake_is_an_octavo_error(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(*MISTAKES[message])
    assert isinstance(out.exception, OctavoError), out.exception
    assert message in str(out.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "no/such-model"], "cannot load model no/such-model"),
        (["generate", "x", "--adapter", "nope"], "no adapter folder"),
    ],
)
def test_the_shell_sees_one_line_and_exit_code_2(arguments, message):
    out = shell(*arguments)
    assert out.returncode == 2
    lines = out.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_the_module_of_the_command_runs_as_one():
    command = [sys.executable, "-m", "octavo.cli.main"]
    out = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "generate" in out.stdout
    out = subprocess.run([*command, "generate", "x", "--adapter", "a+"], capture_output=True, text=True)
    assert (out.returncode, out.stderr.count("error: ")) == (2, 1)


def test_ctrl_c_in_training_leaves_a_checkpoint(tmp_path, tiny_folder):
    import signal
    import time

    (tmp_path / "t.txt").write_text(TEXT)
    command = [sys.executable, "-c", "from octavo.cli.main import main; main()", "retrofit", "dms",
               str(tmp_path / "run"), "--data", str(tmp_path / "t.txt"), "--model", str(tiny_folder), "--no-sampled",
               "--length", "300",
               "--window", "16", "--batch", "2", "--steps", "5000", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_the_shipped_text_holds_the_answers_to_the_shipped_questions():
    from octavo.cli.demo import QUESTIONS, TEXT

    text = Path(TEXT).read_text()
    assert all(fact in text for fact in ("482916", "70351", "Barnaby Quill"))
    assert len(QUESTIONS) == 3


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_input_that_is_not_utf_8_is_refused(command):
    out = run(command, "--device", "cpu", input=b"caf\xe9\n")
    assert isinstance(out.exception, PromptError)
    assert "standard input is not utf-8" in str(out.exception)


def test_chat_goes_on_after_a_line_that_is_too_long():
    out = run("chat", "--max-new-tokens", "4", "--device", "cpu", input="word " * 9000 + "\nHello.\n\n")
    assert out.exit_code == 0, out.exception
    assert out.stdout.count("error: the conversation would have") == 1
    assert out.stdout.count(" B held") == 2


@pytest.fixture
def measured(monkeypatch):
    """Adapters that `evaluate` would have measured, and what it does meanwhile."""
    calls = {"adapters": None, "meanwhile": lambda: None}

    def run_evaluation(model, tokenizer, text, adapters, *rest):
        calls["adapters"] = [adapter.name for adapter in adapters]
        calls["meanwhile"]()
        return Evaluation("m", EvaluationSettings())

    monkeypatch.setattr("octavo.cli.training.run_evaluation", run_evaluation)
    monkeypatch.setattr("octavo.cli.measure.load_plain", lambda *_: (None, None))
    return calls


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["dms-8x"]),
        (["--adapter", "auto"], ["dms-8x"]),
        (["--adapter", "none"], []),
        (["--adapter", "none", "--adapter", "dms-16x"], ["dms-16x"]),
        (["--model", "published"], ["published"]),
        (["--model", "published", "--adapter", "auto", "--adapter", "dms-8x"], ["published", "dms-8x"]),
        (["--model", "elsewhere"], []),
    ],
)
def test_evaluate_measures_the_model_s_own_adapter(measured, tmp_path, monkeypatch, options, names):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    publish(tmp_path / "published", model, transformed(model))
    out = run("evaluate", __file__, *options)
    assert out.exit_code == 0, out.exception
    assert measured["adapters"] == names


def test_evaluate_says_where_it_could_not_write(measured, tmp_path):
    measured["meanwhile"] = (tmp_path / "d").rmdir
    out = run("evaluate", __file__, "--out", str(tmp_path / "d" / "e.json"))
    assert isinstance(out.exception, OutputFileError), out.exception
