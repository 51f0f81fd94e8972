"""`octavo evaluate --suite long` and `octavo compare`, run as a user runs them on a tiny model."""

import json

import pytest
from typer.testing import CliRunner

import octavo
from octavo.cli import main as cli
from octavo.cli.long_suite import read_record
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.results import share_text
from octavo.retrofit.suite import SuiteTexts
from octavo.retrofit.suite import run as suite_run
from tiny import tiny_adapter, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = " ".join(
    f"On day {i} the ship of Bergen was seen near the harbour, and {i * 7} people spoke of it for a long time after."
    for i in range(110)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of 2,048 positions, gates for it and a text."""
    from octavo.models import default_model, load_tokenizer

    folder = tmp_path_factory.mktemp("suite")
    model = tiny_model(vocab_size=49152, max_position_embeddings=2048, num_hidden_layers=2)
    model.save_pretrained(folder / "model")
    load_tokenizer(default_model()).save_pretrained(folder / "model")
    octavo.save_adapter(tiny_adapter(model), folder / "gates")
    (folder / "t.txt").write_text(TEXT)
    return folder


def suite(place, *more):
    amounts = [
        "--texts",
        "2",
        "--cases",
        "2",
        "--nll-length",
        "1800",
        "--lengths",
        "1800",
        "--no-sample",
        "--no-baselines",
    ]
    where = [
        "--model",
        str(place / "model"),
        "--adapter",
        f"8x={place / 'gates'}",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    return CliRunner().invoke(cli.app, ["evaluate", str(place / "t.txt"), "--suite", "long", *amounts, *where, *more])


def test_the_suite_writes_a_record_that_compare_shows(place, tmp_path):
    out = suite(place, "--out", str(tmp_path / "long.json"))
    assert out.exit_code == 0, out.exception
    record = read_record(tmp_path / "long.json")
    assert [row.policy for row in record.policies] == ["dense", "8x"]
    assert "no code was given" in out.stdout
    assert "±" in out.stdout
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "long.md").read_text().startswith("|  | dense | 8x |")
    assert not (tmp_path / "long.json.new").exists()
    names = ["--png", str(tmp_path / "c.png"), "--table", str(tmp_path / "c.md"), "--out", str(tmp_path / "c.json")]
    out = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "long.json"), *names])
    assert out.exit_code == 0, out.exception
    assert read_record(tmp_path / "c.json") == record
    assert (tmp_path / "c.md").read_text() == (tmp_path / "long.md").read_text()
    assert (tmp_path / "c.png").exists()


def test_an_interrupted_suite_keeps_what_it_measured(place, tmp_path, monkeypatch):
    entry = suite_run._Bench.entry

    def dense_only(bench, parts):
        if parts.name != "dense":
            raise KeyboardInterrupt
        return entry(bench, parts)

    monkeypatch.setattr(suite_run._Bench, "entry", dense_only)
    for name in ("task_sets", "greedy_sets"):
        monkeypatch.setattr(suite_run, name, lambda *_: [])
    out = suite(place, "--out", str(tmp_path / "long.json"))
    assert out.exit_code != 0
    assert [row.policy for row in read_record(tmp_path / "long.json").policies] == ["dense"]
    out = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "long.json")])
    assert out.exit_code == 0, out.exception
    assert "dense" in out.stdout


def test_mistakes_are_errors_before_the_work(place, tmp_path):
    for more, error, message in (
        (["--lengths", "3000"], ConfigError, "has 2,048 positions and the suite asks for 3,000"),
        (["--lengths", "900"], ConfigError, "at least 1,800 tokens, not 900"),
        (["--text", "nameless.txt"], ConfigError, "NAME=FILE"),
        (["--code", str(place / "gates" / "adapter.safetensors")], TextFileError, "text in UTF-8"),
    ):
        out = suite(place, *more)
        assert isinstance(out.exception, error), out.exception
        assert message in str(out.exception)
    (tmp_path / "other.json").write_text(json.dumps({"suite": "long"}))
    out = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "other.json")])
    assert isinstance(out.exception, TextFileError)


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(100, "1/7.18"), (718, "1"), (740, "1.03x"), (717, "1"), (1436, "2.00x"), (714, "1/1.01")]
)
def test_bytes_are_shown_as_people_say_them(nbytes, shown):
    assert share_text(nbytes, 718) == shown


@pytest.mark.parametrize(
    ("positions", "advice"), [(512, "tasks need contexts of 1,800 at least"), (4096, "held_at of at most 4,096")]
)
def test_a_model_with_too_few_positions_is_told_what_to_ask_for(positions, advice):
    model = tiny_model(max_position_embeddings=positions)
    with pytest.raises(ConfigError, match=f"has {positions:,} positions and the suite asks for 8,192.*{advice}"):
        suite_run.evaluate_long(model, None, SuiteTexts(None))
