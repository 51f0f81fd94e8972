"""`octavo cache`, `octavo chat --reuse` and `octavo bench reuse`, run as a user runs them."""

import json
import re

import pytest
from typer.testing import CliRunner

from octavo.bench.engine import subjects
from octavo.cli import main as cli
from octavo.config import Eviction
from octavo.errors import ConfigError
from octavo.reuse import ReuseStore
from reuse.plain import Model
from reuse.test_disk import SETTINGS, prompt
from tiny import tiny_adapter, tiny_model, tokens

runner = CliRunner()


def run(*arguments, **options):
    out = runner.invoke(cli.app, list(map(str, arguments)), **options)
    assert out.exit_code == 0, (out.stdout, out.exception)
    return out.stdout


@pytest.fixture
def folder(tmp_path):
    model, store = Model(Eviction(7)), ReuseStore("1MB", tmp_path / "kv", **SETTINGS)
    for i in range(3):
        with store.request(tags=[f"tag{i}"]):
            model.ask(store, prompt(i, 90))
    store.close()
    return tmp_path / "kv"


def test_a_folder_is_looked_at_and_managed(folder):
    assert "3 records" in run("cache", "stats", folder)
    assert json.loads(run("cache", "stats", folder, "--json"))["disk_records"] == 3
    records = json.loads(run("cache", "list", folder, "--json"))
    assert [each["tokens"] for each in records] == [90, 90, 90]
    assert records[0]["key"][:12] in run("cache", "list", folder)
    ids = json.dumps(prompt(1, 90))
    assert "89 of 90 tokens would be reused" in run("cache", "explain", folder, input=ids)
    assert "90 tokens pinned" in run("cache", "pin", folder, "--ttl", 500, input=ids)
    assert "pinned" in run("cache", "list", folder)
    assert "90 tokens let go" in run("cache", "pin", folder, "--undo", input=ids)
    assert "3 records are whole, 0 were damaged" in run("cache", "verify", folder)
    assert "1 records deleted, 2 left" in run("cache", "delete", folder, "--tag", "tag2")
    assert "2 records deleted, 0 left" in run("cache", "delete", folder, "--all")


@pytest.fixture
def url(tmp_path):
    served = pytest.importorskip("reuse.served", reason="fakeredis is not installed")
    if not served.installed():
        pytest.skip("no redis-server and no valkey-server is installed")
    server = served.Real(tmp_path)
    model, store = Model(Eviction(7)), ReuseStore(None, remote=server.url, **SETTINGS)
    for i in range(3):
        with store.request(tags=[f"tag{i}"]):
            model.ask(store, prompt(i, 90))
            store.flush()
    store.close()
    yield server.url
    server.stop()


def test_a_server_is_looked_at_and_managed(url):
    here = ["--remote", url]
    assert re.search("3 records, .* on the server", run("cache", "stats", *here))
    assert json.loads(run("cache", "stats", *here, "--json"))["remote_records"] == 3
    records = json.loads(run("cache", "list", *here, "--json"))
    assert [(each["tokens"], each["remote"], each["disk"]) for each in records] == [(90, True, False)] * 3
    ids = json.dumps(prompt(1, 90))
    assert "89 of 90 tokens would be reused" in run("cache", "explain", *here, input=ids)
    assert "90 tokens pinned" in run("cache", "pin", *here, "--ttl", 500, input=ids)
    assert "pinned" in run("cache", "list", *here)
    assert "90 tokens let go" in run("cache", "pin", *here, "--undo", input=ids)
    assert "3 records are whole, 0 were damaged" in run("cache", "verify", *here)
    assert "1 records deleted, 2 left" in run("cache", "delete", *here, "--tag", "tag2")
    assert "2 records deleted, 0 left" in run("cache", "delete", *here, "--all")


def test_a_server_that_cannot_be_reached_is_told():
    pytest.importorskip("redis")
    for arguments, match in (
        (["--remote", "redis://127.0.0.1:1"], "cannot use the server at 127.0.0.1:1"),
        (["--remote", "nowhere"], "must be a URL"),
        ([], "either a folder"),
        (["/tmp", "--remote", "redis://127.0.0.1:1"], "either a folder"),
    ):
        out = runner.invoke(cli.app, ["cache", "stats", *arguments])
        assert isinstance(out.exception, ConfigError)
        assert match in str(out.exception)


def test_first_tokens_from_a_server_are_measured(url, tmp_path, smollm, full):
    if not full:
        pytest.skip("two fresh processes take over 20 s; --full runs them")
    tiny_model(vocab_size=49152).save_pretrained(tmp_path / "model")
    smollm[1].save_pretrained(tmp_path / "model")
    options = ["--part", "first", "--document", 200, "--rounds", 1, "--device", "cpu", "--dtype", "fp32"]
    options += ["--model", tmp_path / "model", "--adapter", "none", "--remote", url]
    assert "document on the server" in run("bench", "reuse", *options, "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["first"]
    assert found["remote_ratio"] == found["cold_s"] / found["remote_s"] > 0
    assert "3 records" in run("cache", "stats", "--remote", url), "nothing of it stays"


def test_verify_finds_what_is_damaged(folder):
    path = sorted(folder.glob("*.kv"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="has dropped a file"):
        out = runner.invoke(cli.app, ["cache", "verify", str(folder)])
    assert out.exit_code == 1
    assert "1 were damaged" in out.stdout
    assert path.name in out.stdout.replace("\n", "")


def test_mistakes_are_told(folder):
    cases = {"there is no folder": ["stats", "/no/folder"], "or --all for everything": ["delete", folder],
             "give --text": ["explain", folder]}  # fmt: skip
    for message, arguments in cases.items():
        out = runner.invoke(cli.app, ["cache", *map(str, arguments)], input="no json")
        assert isinstance(out.exception, ConfigError)
        assert message in str(out.exception)


def test_a_chat_is_found_again_by_another_one(tmp_path):
    said = "Tell me all that you know about the city of Paris and about its river, its bridges and its people. " * 2
    outs = [
        run("chat", "--max-new-tokens", 6, "--device", "cpu", "--dtype", "fp32", "--reuse", tmp_path,
            input=f"{said}\n\n") for _ in range(2)
    ]  # fmt: skip
    answers = [re.search(r"you> (.*?)\n\d+ tokens", out, re.S).group(1) for out in outs]
    assert answers[0].strip()
    assert answers[0] == answers[1]
    assert "reused" not in outs[0]
    assert int(re.search(r"(\d+) reused", outs[1]).group(1)) > 64


def test_the_benchmark_measures_every_part(tmp_path, smollm):
    tiny_model(vocab_size=49152).save_pretrained(tmp_path / "model")
    smollm[1].save_pretrained(tmp_path / "model")
    options = ["--document", 200, "--rounds", 1, "--questions", 2, "--device", "cpu", "--dtype", "fp32"]
    options += ["--model", tmp_path / "model", "--adapter", "none", "--no-peer"]
    out = run("bench", "reuse", *options, "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert all(found["first"][name] > 0 for name in ("cold_s", "miss_s", "memory_s", "disk_s"))
    assert 0.5 < found["bytes"]["ratio"] < 1.01
    assert "document on disk" in out
    computed = {(row["trace"], row["way"]): row["computed"] for row in found["traces"]}
    chat = "a chat of eight turns"
    assert computed[chat, "reuse store"] < computed[chat, "no reuse"] / 2
    alike = {row["change"]: row for row in found["similar"]}
    assert alike["instruction"]["computed"] < 0.7
    assert alike["instruction"]["kl"] > 0
    embeddings = {row["embedding"]: row["first"] for row in found["embeddings"]}
    assert embeddings["input embeddings (default)"]["edit"] == 1.0
    assert len(embeddings) >= 2
    assert {row["policy"] for row in found["policies"]} == {"lru", "slru"}
    assert {"commit", "cpu", "torch", "command"} <= set(found)
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_the_benchmark_measures_a_shape_in_memory_alone(tmp_path, monkeypatch):
    model = tiny_model()
    made = subjects.Subject("tiny", model, tiny_adapter(model, window=8), tokens(1, 50)[0], random_weights=True)
    monkeypatch.setattr(subjects, "subject", lambda *given: made)
    options = ["--shape", "llama8b", "--document", 100, "--rounds", 1, "--device", "cpu"]
    run("bench", "reuse", "--part", "first", *options, "--out", tmp_path / "r.json")
    first = json.loads((tmp_path / "r.json").read_text())["first"]
    assert first["memory_s"] > 0
    assert "disk_s" not in first
    wrong = ["--part", "first,bytes"], ["--remote", "redis://here"], ["--adapter", "dms-8x"], ["--model", str(tmp_path)]
    for more in (["--part", "first", *each] for each in wrong):
        out = runner.invoke(cli.app, ["bench", "reuse", *map(str, options), *more])
        assert isinstance(out.exception, ConfigError)
        assert "--shape" in str(out.exception)
