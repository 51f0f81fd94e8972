"""`octavo bench engine` on tiny models: what it times is what it says, and nothing measured is lost."""

import json
import sys
import types

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import octavo
from octavo.attachment.supported import fingerprint
from octavo.bench import energy
from octavo.bench.engine import mixed, plot, steps, subjects
from octavo.bench.source import surroundings
from octavo.cli import bench as command
from octavo.dms import Adapter
from octavo.errors import CacheBudgetError, ConfigError, TextFileError
from tiny import tiny_adapter, tiny_model, tokens

TINY = "engine --device cpu --steps 3"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The default model is a tiny one, and memory takes no time to measure."""
    model = tiny_model()

    def subject(shape, text, device, dtype=None):
        if shape not in subjects.SHAPES:
            raise ConfigError(f"--shape takes other names than {shape}")
        return subjects.Subject("tiny", model, tiny_adapter(model, window=8), tokens(1, 50)[0], random_weights=False)

    monkeypatch.setattr(subjects, "subject", subject)
    monkeypatch.setattr(steps, "copy_bandwidth", lambda device: 1e9)
    return subject("default", "", "cpu")


def invoke(*words: str) -> list[str]:
    result = CliRunner().invoke(command.app, [*TINY.split(), *words])
    if result.exception is not None:
        raise result.exception
    lines: list[str] = result.stdout.splitlines()
    return lines


def test_the_record_says_all_that_the_table_shows(tmp_path):
    out = tmp_path / "engine.json"
    peer = tmp_path / "peer.jsonl"
    peer.write_text('{"engine": "peer", "what": "decode", "B": 1, "T": 20, "decode_ms": 1}\n{"what": "nothing"}\n\n3\n')
    load = ["--mixed", "3", "--prompts", "5,30", "--answers", "1,4", "--no-plain", "--peer", str(peer)]
    lines = invoke("--sizes", "1x20,3x40", "--kv", "dense,model,int8", "--out", str(out), *load)
    found = json.loads(out.read_text())
    names = ["octavo, nothing evicted", "octavo, tiny", "octavo, tiny, int8"]
    assert [(s["batch"], s["context"], s["name"]) for s in found["steps"]] == [
        (batch, context, name) for batch, context in ((1, 20), (3, 40)) for name in names
    ]
    for step in found["steps"]:
        read = (step["weight_bytes"] + step["kv_bytes"]) / 1e9
        assert step["of_floor"] == pytest.approx(read / step["decode_ms"] * 1000)
    assert [run["name"] for run in found["mixed"]] == names
    assert len({run["tokens"] for run in found["mixed"]}) == 1
    assert (found["gpu"], found["subject"], found["copy_GB_per_s"], len(found["peers"])) == (None, "tiny", 1.0, 2)
    assert json.loads(lines[-1]) == {"subject": "tiny", "steps": 6, "mixed": 3}
    assert (tmp_path / "engine.png").stat().st_size > 10_000


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (2, 700), (6, 30)])
def test_all_requests_run_for_all_steps_that_are_timed(tiny, monkeypatch, batch, context):
    running = []

    def timed(device, count, step):
        engine = step.__self__
        for _ in range(count):
            step()
            running.append(len(engine.runner.running))
        return 1.0

    monkeypatch.setattr(steps, "_timed", timed)
    found = steps.engine_step("x", tiny, batch, context, 20, 1e9, adapter=None)
    assert running == 20 * [batch]
    slot = 2 * 16 * 4 + 4
    tokens_seen = sum(context + steps.SETTLING + batch - i for i in range(batch))
    assert found.kv_bytes == pytest.approx(3 * 2 * slot * tokens_seen, rel=0.1, abs=3 * 2 * slot * batch)


def test_unattached_steps_read_all_keys_and_values(tiny):
    found = steps.plain_step(tiny, 2, 30, 3, 1e9)
    assert found.kv_bytes == 2 * 2 * 3 * 2 * 16 * 4 * (30 + steps.SETTLING + 3)
    table = tiny.model.get_input_embeddings().weight
    assert found.weight_bytes == sum(p.nbytes for p in tiny.model.parameters()) - table.nbytes


def test_prompts_of_a_batch_may_come_from_a_store(tiny):
    whole = steps.engine_step("x", tiny, 4, 200, 3, 1e9, adapter=None)
    stored = steps.engine_step("x", tiny, 4, 200, 3, 1e9, distinct=1, adapter=None)
    assert (whole.distinct, stored.distinct) == (4, 1)
    assert stored.kv_bytes == whole.kv_bytes  # each has pages of its own


@pytest.mark.parametrize("stops", [KeyboardInterrupt, CacheBudgetError("no room"), torch.OutOfMemoryError("full")])
def test_what_was_measured_stays_where_a_later_size_fails(tmp_path, monkeypatch, stops):
    out, real = tmp_path / "engine.json", steps.engine_step

    def engine_step(name, subject, batch, *rest, **settings):
        if batch == 2:
            raise stops
        return real(name, subject, batch, *rest, **settings)

    monkeypatch.setattr(steps, "engine_step", engine_step)
    result = CliRunner().invoke(
        command.app, [*TINY.split(), "--sizes", "1x20,2x20,1x30", "--kv", "dense", "--no-plain", "--out", str(out)]
    )
    interrupted = stops is KeyboardInterrupt
    assert (result.exit_code != 0) == interrupted
    found = [(s["batch"], s["context"]) for s in json.loads(out.read_text())["steps"]]
    assert found == [(1, 20)] if interrupted else [(1, 20), (1, 30)]
    assert "1 x 20: octavo, nothing evicted: " in result.stderr
    assert ("does not fit" in result.stderr) != interrupted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--sizes 8", "batch x context"),
        ("--sizes 0x5", "numbers from 1"),
        ("--sizes 1x5x5", "batch x context"),
        ("--sizes 4x1000", "positions"),
        ("--kv int4", "int8"),
        ("--shape gpt9", "shape"),
        ("--device banana", "--device"),
        ("--prompts 5", "fewest"),
        ("--answers 9,3", "rising"),
        ("--mixed 2 --prompts 900,1000 --answers 50,60", "positions"),
        ("--peer nowhere.jsonl", "nowhere"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        invoke(*words.split())


def test_a_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TextFileError):
        invoke("--text", str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(TextFileError):
        invoke("--text", str(tmp_path / "empty.txt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no GPU"):
        invoke("--device", "cuda")


def test_peers_that_stop_are_not_waited_for(tiny):
    class Stopped:
        def add_request(self, *args, **kwargs):
            pass

        def get_result(self, timeout):
            return None

        def is_running(self):
            return False

    with pytest.raises(ConfigError, match="generate_batch"):
        mixed._served(Stopped(), mixed.Load([[1, 2]], [3]), 1.0)


def test_a_plot_shows_each_size_with_its_peers_and_cuts_what_is_much_slower():
    found = {
        "steps": [
            {"name": name, "batch": batch, "context": 20, "decode_ms": ms, "of_floor": 0.5}
            for batch, name, ms in ((1, "slow", 80.0), (1, "ours", 2.0), (2, "ours", 3.0))
        ],
        "peers": [
            {"engine": "peer", "kv": "fp8", "B": 1, "T": 20, "decode_ms": 4.0},
            {"engine": "peer", "B": 1, "T": 20, "prefill_ms": 4.0},
        ],
    }
    rows = plot._rows(found, (1, 20))
    assert rows == [("peer, KV fp8", 4.0, 0.0), ("slow", 80.0, 0.5), ("ours", 2.0, 0.5)]
    assert plot._rows(found, (2, 20)) == [("ours", 3.0, 0.5)]
    axes = Figure().subplots()
    plot._bars(axes, rows)
    assert [text.get_text() for text in axes.texts] == ["4.00", "80.00 (cut)", "2.00"]
    assert axes.get_xlim()[1] < 6


@pytest.mark.parametrize(("before", "after", "seconds", "found"), [
    (None, 5.0, 9.0, None), (5.0, None, 9.0, None), (5.0, 25.0, 0.5, None), (5.0, 25.0, 2.0, 0.2),
])  # fmt: skip
def test_joules_are_told_where_they_were_counted_for_long_enough(before, after, seconds, found):
    assert energy.per_token(before, after, seconds, 100) == found


@pytest.mark.parametrize("fails", [None, "nvmlInit", "nvmlDeviceGetTotalEnergyConsumption"])
def test_joules_are_the_drivers(monkeypatch, fails):
    class Driver(types.ModuleType):
        NVMLError = type("NVMLError", (Exception,), {})

        def __getattr__(self, name):
            def call(*args):
                if name == fails:
                    raise self.NVMLError
                return {"nvmlDeviceGetHandleByUUID": args, "nvmlDeviceGetTotalEnergyConsumption": 1500}.get(name)

            return call

    assert energy.joules(CPU) is None
    monkeypatch.setitem(sys.modules, "pynvml", Driver("pynvml"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="some"))
    energy._counter.cache_clear()
    assert energy.joules(torch.device("cuda", 0)) == (1.5 if fails is None else None)
    energy._counter.cache_clear()


def test_the_commit_is_that_of_the_source_or_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert surroundings(CPU)["commit"] is None


def test_made_up_gates_keep_about_what_they_should():
    model = tiny_model(hidden_size=768, num_attention_heads=12, num_key_value_heads=6)
    like = tiny_adapter(model, window=8)
    kept = [0.05, 0.3, 0.9]
    gates: Adapter = subjects.made_up_gates(model, like, kept)
    assert (gates.gates.spec.hidden, gates.fingerprint) == (768, fingerprint(model))
    found = subjects.kept_by_head(model, gates, tokens(1, 900)[0])
    spec = gates.gates.spec
    drawn = torch.special.ndtr(spec.offset / spec.scale - gates.gates.bias.detach()).flatten().sort().values
    assert {round(share, 3) for share in drawn.tolist()} == set(kept)
    assert (torch.tensor(found) - drawn).abs().mean() < 0.08
    assert octavo.attachment.attachment_of(model) is None
