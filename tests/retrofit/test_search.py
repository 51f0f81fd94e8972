"""`octavo retrofit swiftkv`, `swiftkv+dms` and `--search`, run as a user runs them on a tiny model."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from octavo.cli import main as cli
from octavo.cli.training import search_table
from octavo.dms import load_adapter
from octavo.errors import ConfigError, OctavoError, RetrofitError
from octavo.retrofit.card import card_text
from octavo.retrofit.results import EvaluationSettings
from octavo.retrofit.search import Found, SearchResult, candidates
from octavo.retrofit.settings import RetrofitSettings, SwiftSettings
from octavo.swiftkv import load_swiftkv_adapter
from tiny import tiny_model

runner = CliRunner()
TEXT = "It was a quiet harbour town, and nothing much happened there. " * 60


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a tiny model of 3 layers and a text."""
    folder = tmp_path_factory.mktemp("search")
    tiny_model(vocab_size=49152).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "t.txt").write_text(TEXT)
    (folder / "chats.jsonl").write_text('{"text": "A short one."}\n{"text": "Another, a little longer."}\n' * 40)
    return folder


def run(place, *arguments, length=300, **options):
    data = ["--data", str(place / "t.txt"), "--data", f"{place / 'chats.jsonl'}:0.3"]
    base = ["--model", str(place / "model"), "--length", str(length), "--batch", "2", "--micro-batch", "2",
            "--no-sampled", "--device", "cpu", "--dtype", "fp32"]  # fmt: skip
    out = runner.invoke(cli.app, ["retrofit", *arguments, *data, *base], **options)
    if out.exception is not None:
        raise out.exception
    return out


def test_swiftkv_is_trained_measured_resumed_and_extended_with_gates(place, tmp_path):
    folder = tmp_path / "swift"
    options = ["swiftkv", str(folder), "--skip", "0.5", "--steps", "3"]
    out = run(place, *options, "--held-out", str(place / "t.txt"))
    assert "in " in out.stdout
    for name in ("adapter.json", "README.md", "log.jsonl", "training.png", "checkpoint.safetensors"):
        assert (folder / name).exists(), name
    adapter = load_swiftkv_adapter(folder)
    assert (adapter.name, adapter.transform.spec.kv_layers) == ("swift", 1)
    rows = adapter.card["evaluation"]["rows"]
    assert [row["policy"] for row in rows] == ["dense", "swift"]
    assert f"{rows[1]['nll']:.4f}" in (folder / "README.md").read_text()
    run(place, *options, "--resume")
    assert load_swiftkv_adapter(folder).card["evaluation"]["rows"] == rows, "nothing was trained since"
    (folder / "log.jsonl").unlink()
    with pytest.raises(RetrofitError, match=r"log\.jsonl does not hold"):
        run(place, *options, "--resume")

    joint = tmp_path / "joint"
    out = run(
        place, "swiftkv+dms", str(joint), "--name", "[/b] joint",
        "--init", str(folder), "--target", "2", "--window", "16", "--steps", "2",
        "--held-out", str(place / "t.txt"),
    )  # fmt: skip
    swiftkv, gates = load_swiftkv_adapter(joint), load_adapter(joint / "dms-2x")
    assert swiftkv.transform.spec.kv_layers == 1, "as the adapter to start from"
    assert gates.made_on == swiftkv.transform.fingerprint()
    assert [row["policy"] for row in gates.card["evaluation"]["rows"]] == ["dense", "[/b] joint", "[/b] joint + dms-2x"]
    assert "[/b] joint and dms-2x in " in out.stdout
    assert (swiftkv.card["init"], gates.card["init"]) == ("swift", None)
    assert "KV layers, made on SwiftKV with K=1" in (joint / "dms-2x" / "README.md").read_text()


def test_search_measures_every_share_and_recommends(place, tmp_path):
    folder = tmp_path / "s"
    options = ["swiftkv", str(folder), "--search", "--shares", "0.3,0.6", "--steps", "2", "--limit", "99"]
    out = run(place, *options, "--held-out", str(place / "t.txt"))
    found = json.loads((folder / "search.json").read_text())
    assert [row["kv_layers"] for row in found["rows"]] == [2, 1]
    assert [row["skip"] for row in found["rows"]] == pytest.approx([1 / 3, 2 / 3])
    assert found["recommended"] == "k1"
    assert found["evaluation"]["texts"] == 2, "as many as the text has room for, not 16"
    assert found["settings"]["steps"] == 2
    for row in found["rows"]:
        assert row["to_base"] == pytest.approx(row["nll"] - found["base_nll"])
        assert f"{row['nll']:.4f}" in out.stdout
        adapter = load_swiftkv_adapter(folder / row["name"])
        assert adapter.transform.spec.kv_layers == row["kv_layers"]
        assert (folder / row["name"] / "README.md").read_text() == card_text(adapter)
        assert f"{row['to_base']:+.4f}" in card_text(adapter)
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "k1" / "log.jsonl").read_text()
    run(place, *options, "--resume", "--held-out", str(place / "t.txt"))
    assert (folder / "k1" / "log.jsonl").read_text() == before, "nothing is trained again"


def result(*costs: float, limit: float = 0.04) -> SearchResult:
    rows = [Found(f"k{i}", (i + 1) / 10, i, 1, 1.0, 3.0 + cost, cost) for i, cost in enumerate(costs)]
    settings = RetrofitSettings(swiftkv=SwiftSettings(1))
    return SearchResult(settings, EvaluationSettings(), limit, 3.0, rows)


def test_the_largest_share_under_the_limit_is_recommended():
    assert result(0.01, 0.03, 0.05).recommended.name == "k1"
    assert result(0.01, 0.05, 0.039).recommended.name == "k2"
    assert result(0.04, 0.05).recommended is None
    assert result(0.04, 0.05).to_json()["recommended"] is None
    console = Console(width=120)
    with console.capture() as captured:
        console.print(search_table(result(0.01, 0.05)))
    (line,) = (line for line in captured.get().splitlines() if "recommended" in line)
    assert "+0.0100" in line


def test_equal_shares_are_tried_once():
    assert candidates(30, [0.17, 0.27, 0.33, 0.4, 0.5], 1) == [24, 21, 20, 18, 15]
    assert candidates(4, [0.3, 0.4, 0.5], 2) == [2]
    with pytest.raises(ConfigError, match="at least one"):
        candidates(30, [], 1)


MISTAKES = {
    "give --held-out": ["swiftkv", "run", "--search"],
    "--shares takes numbers": ["swiftkv", "run", "--search", "--shares", "a,b"],
    "not --skip": ["swiftkv", "run", "--search", "--skip", "0.5"],
    "No such file": ["swiftkv", "run", "--search", "--held-out", "/no/such.txt"],
    "between 0 and 1": ["swiftkv", "run", "--skip", "1.5"],
    "not both": ["swiftkv", "run", "--skip", "0.5", "--kv-layers", "2"],
    "must lie in 1..2": ["swiftkv", "run", "--kv-layers", "3"],
    "do not divide": ["swiftkv+dms", "run", "--kv-layers", "2", "--group", "2"],
    "start must be": ["swiftkv", "run", "--start", "luck"],
    "no adapter folder": ["swiftkv+dms", "run", "--init", "nowhere"],
    "lr must be positive": ["swiftkv", "run", "--lr", "0"],
    "or --name": ["swiftkv", "run", "--search", "--name", "x"],
    "are for --search": ["swiftkv", "run", "--limit", "0.1"],
    "--limit and --shares": ["swiftkv", "run", "--shares", "0.5"],
    "limit must be a finite": ["swiftkv", "run", "--search", "--limit", "nan", "--held-out", "/no/such.txt"],
    "temperature must be a finite": ["swiftkv", "run", "--temperature", "inf"],
    "seed must lie in": ["swiftkv", "run", "--seed", "-1"],
    "holds no text": ["swiftkv", "run", "--held-out", "empty.txt"],
    "300 are needed": ["swiftkv", "run", "--held-out", "short.txt"],
    "not '../out'": ["swiftkv+dms", "run", "--gates-name", "../out"],
    "not 'a+b'": ["swiftkv+dms", "run", "--gates-name", "a+b"],
    "not '..'": ["swiftkv+dms", "run", "--gates-name", ".."],
    "not 'dms-1e+06x'": ["swiftkv+dms", "run", "--target", "1e6"],
    "log.jsonl is the name of a file": ["swiftkv+dms", "run", "--gates-name", "log.jsonl"],
    "notes is the name of a file": ["swiftkv+dms", "run", "--gates-name", "notes"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_every_mistake_is_an_octavo_error(message, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(OctavoError) as caught:
        run(place, *MISTAKES[message], "--window" if "swiftkv+dms" in MISTAKES[message] else "--steps", "5")
    assert message in str(caught.value)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["notes"], "refused before anything is trained"


def test_missing_data_and_short_texts_are_refused(place, tmp_path):
    base = ["--model", str(place / "model"), "--device", "cpu", "--length", "300"]
    out = runner.invoke(cli.app, ["retrofit", "swiftkv", str(tmp_path / "r"), "--data", "/no/such.txt", *base])
    assert "cannot read /no/such.txt" in str(out.exception)
    out = runner.invoke(cli.app, ["retrofit", "swiftkv", str(tmp_path / "r"), "--no-sampled", *base])
    assert "nothing to train on" in str(out.exception)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(OctavoError, match="300 are needed"):
        run(place, "swiftkv", str(tmp_path / "r"), "--search", "--held-out", str(tmp_path / "short.txt"))


def test_cards_name_what_training_started_from(place, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    run(place, "swiftkv", ".", "--steps", "1")
    adapter = load_swiftkv_adapter(tmp_path / "a")
    assert adapter.name == "a"
    assert "fitted by regression" in card_text(adapter)
    settings = {**adapter.card["settings"], "swiftkv": {"start": "published"}}
    assert "own projections" in card_text(replace(adapter, card={**adapter.card, "settings": settings}))
    assert "Started from x." in card_text(replace(adapter, card={**adapter.card, "init": "x"}))
