"""`octavo bench vdb`: every engine that is installed answers as numpy does, and the report is complete."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from octavo.bench.vdb import bars, data, engines, exact, graph, overhead, report
from octavo.bench.vdb.timing import Measurement, alternate, blas_threads, installed, rate, spread, times_better
from octavo.cli import bench as command
from octavo.errors import ConfigError, OutputFileError, TextFileError

MODULES = (engines, graph, overhead)
STORAGES = ("f32", "f32+i8")
TINY = "vdb --rows 400 --dims 16 --rounds 2 --threads 1 --sample 0.001 --quick"


def invoke(line: str) -> list[str]:
    result = CliRunner().invoke(command.app, line.split())
    if result.exception is not None:
        raise result.exception
    lines: list[str] = result.stdout.splitlines()
    return lines


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "installed", lambda name: False)


@pytest.fixture
def vectors() -> data.Vectors:
    return data.random_directions(500, 24, 20)


@pytest.mark.parametrize("offer", engines.offers(STORAGES), ids=lambda offer: offer.name)
def test_engines_agree_with_numpy(offer: engines.Offer, vectors: data.Vectors) -> None:
    for name in offer.needs:
        pytest.importorskip(name)
    x, queries = vectors.rows, vectors.queries
    nearest = np.argsort(-(queries @ x.T), axis=1)[:, :10]
    made, left_out = engines.make([offer], x, 10, 1e9)
    assert not left_out
    for engine in made:
        for threads in (1, 2):
            engine.prepare(threads)
            with blas_threads(threads):
                assert (engine.search(queries, threads) == nearest).all(), engine.name
                assert (engine.search(queries[3:4], threads) == nearest[3:4]).all(), engine.name


@pytest.mark.parametrize("name", ["octavo f32", "octavo f32+i8", "hnswlib", "usearch", "faiss"])
def test_graphs_find_what_numpy_does(name: str, vectors: data.Vectors) -> None:
    if not name.startswith("octavo"):
        pytest.importorskip(name)
    makers, _ = graph._makers(24, 10)
    built = makers[name]()
    built.build(vectors.rows, 2)
    truth = data.Truth(vectors, 10, euclidean=True)
    assert truth.recall(built.search(vectors.queries, 200)) > 0.97


def test_whole_run_is_told_in_full(tmp_path: Path) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "run.png"
    printed = invoke(f"{TINY} --storage f32,f32+i8,bf16 --out {out} --plot {plot}")
    found = json.loads(out.read_text())
    assert {"command", "commit", "cpu", "cores", "kernels", "python", "versions", "load_average"} <= set(found)
    assert {m["part"] for m in found["measurements"]} == {"exact", "build", "graph", "calls", "files"}
    for m in found["measurements"]:
        assert len(m["samples"]) == (1 if m["part"] == "build" else 2)
        assert m["low"] <= m["median"] <= m["high"]
        assert min(m["samples"]) > 0
        if m["part"] == "exact" and m["engine"] not in (engines.STREAM, "octavo bf16"):
            recall = 1.0 if "bf16" not in m["engine"] else 0.8
            assert m["facts"]["recall"] >= recall, m["engine"]
    peers = {"numpy": "threadpoolctl", "faiss": "faiss", "usearch": "usearch", "sqlite-vec": "sqlite_vec"}
    measured = {m["engine"] for m in found["measurements"] if m["part"] == "exact"}
    for name, package in peers.items():
        assert (name in measured) != any(name in left for left in found["left_out"]["exact"]), (name, package)
        assert name not in measured or installed(package)
    last = json.loads(printed[-1])
    assert set(last["figures"]) == {j["what"] for j in found["judgements"]}
    assert last["losses"] == len(found["losses"])
    assert plot.stat().st_size > 5000
    again = invoke(f"vdb --show {out}")
    assert json.loads(again[-1]) == last


@pytest.mark.usefixtures("no_peers")
def test_without_peers_all_are_named(tmp_path: Path) -> None:
    printed = "\n".join(invoke(f"{TINY} --part exact,graph,calls"))
    for name in ("numpy", "faiss", "usearch", "hnswlib", "sqlite-vec"):
        assert f": {name}" in printed
    assert printed.count("pip install octavo[bench]") == 5 + 3 + 4
    assert "lowest recall of f32 and f32+i8" in printed


def test_vectors_of_a_file_are_measured_too(tmp_path: Path) -> None:
    path = tmp_path / "some.npy"
    np.save(path, data.clusters(600, 8, 200).rows)
    invoke(f"{TINY} --part graph,exact --storage f32 --batch 4 --vectors {path} --out {tmp_path / 'run.json'}")
    found = json.loads((tmp_path / "run.json").read_text())
    named = {(m["part"], m["case"]["data"], m["case"]["rows"]) for m in found["measurements"]}
    assert named == {(p, "some.npy", 300) for p in ("exact", "build", "graph")} | {("exact", "random", 400)}


def test_engines_that_do_not_fit_are_left_out(vectors: data.Vectors) -> None:
    offered = engines.offers(("f32",))
    made, left_out = engines.make(offered, vectors.rows, 10, vectors.rows.nbytes * 1.5)
    assert "octavo f32" in [e.name for e in made]
    assert "do not fit" in left_out["octavo f32, cosine"]
    few = engines.Offer("slow", lambda x, k: [], most_rows=10)
    assert engines.make([few], vectors.rows, 10, 1e9) == ([], {"slow": "too slow beyond 10 rows"})


def test_streaming_read_reads_everything() -> None:
    x = np.ones((7, 3), np.float32)  # an odd number of floats, which pieces of whole pairs must cover
    for threads in (1, 2, 3):
        assert engines.stream(x, threads, 1e-4).search(x[:1], threads).size == 0


def test_recall_counts_ties_and_holes() -> None:
    rows = np.array([[1, 0], [1, 0], [0, 1], [0.5, 0]], np.float32)
    truth = data.Truth(data.Vectors("", rows, rows[:1]), 1)
    assert truth.recall(np.array([[0]])) == truth.recall(np.array([[1]])) == 1
    assert truth.recall(np.array([[2]])) == truth.recall(np.array([[-1]])) == truth.recall(np.array([[9]])) == 0
    far = data.Truth(data.Vectors("", rows, rows[3:]), 2, euclidean=True)
    assert far.recall(np.array([[3, 3]])) == 0.5
    assert far.recall(np.array([[3, 1]])) == 1


def test_speed_at_recall_is_interpolated_in_the_logarithm() -> None:
    curve = [(0.8, 1000.0), (0.9, 100.0), (0.9, 90.0), (1.0, 1.0)]
    assert graph.at_recall(curve, 0.85) == pytest.approx(10**2.5)
    assert graph.at_recall(curve, 0.7) == 1000
    assert graph.at_recall(curve[:2], 0.95) is None


def test_ratios_are_of_the_same_round() -> None:
    fast = Measurement("exact", {}, "a", "queries/s", [10.0, 20.0, 30.0])
    slow = Measurement("exact", {}, "b", "queries/s", [5.0, 5.0, 10.0])
    assert times_better(fast, slow) == spread([2.0, 4.0, 3.0]) == (3, 2.5, 3.5)
    quick = Measurement("build", {}, "a", "s", [1.0])
    assert times_better(quick, Measurement("build", {}, "b", "s", [3.0])) == (3, 3, 3)
    assert Measurement.from_json(json.loads(json.dumps(fast.to_json()))) == fast


def test_rounds_alternate_in_changing_order() -> None:
    ran: list[str] = []

    def task(name: str) -> Any:
        return lambda: ran.append(name) or float(len(ran))

    samples = alternate({name: task(name) for name in "abc"}, 8)
    assert all(len(found) == 8 for found in samples.values())
    rounds = [tuple(ran[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_rate_fills_its_time() -> None:
    numbers: list[int] = []
    assert rate(numbers.append, 0.001)() > 0
    assert numbers[:3] == [0, 1, 0]
    assert len(numbers) > 10


def measurements() -> Iterator[Measurement]:
    case = {"data": "random", "rows": 100_000, "dims": 384, "k": 10, "batch": 1, "threads": 1}
    speeds = {engines.STREAM: 100.0, "octavo f32": 95.0, "octavo f32+i8": 300.0, "faiss": 90.0, "usearch": 96.0}
    for name, speed in speeds.items():
        facts = {"recall": 1.0, "overhead": 20.0} if name != engines.STREAM else {}
        yield Measurement("exact", case, name, "queries/s", [speed, speed], facts)


def test_bars_and_losses() -> None:
    found = {j.what: j for j in bars.judge(list(measurements()), "amx")}
    place = "single query, 100,000 x 384, 1 thread"
    assert found[f"f32, times faiss: {place}"].met is True
    assert found[f"f32+i8, times faiss: {place}"].met is False  # 3.33 of 3.5
    assert found[f"f32, share of the streaming read: {place}"].met is None  # a bar of 1M rows
    assert found["f32, bytes per vector beyond the vectors: 100,000 x 384"].met is False
    assert found[f"lowest recall of f32 and f32+i8: {place}"].met is True
    assert bars.losses(list(measurements())) == [f"octavo f32 has 0.99 the speed of usearch ({place})"]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("--part exact,speed", ConfigError, "speed"),
        ("--rows many", ConfigError, "--rows takes numbers"),
        ("--threads 0", ConfigError, "from 1"),
        ("--rows 5 --part exact", ConfigError, "--k 10"),
        ("--rows 50 --part exact --storage f64", ConfigError, "f64"),
        ("--kernels fpga", ConfigError, "fpga"),
        ("--vectors none.npy --part graph", TextFileError, "none.npy"),
        ("--out no/such/folder/x.json", OutputFileError, "no/such/folder"),
        ("--show none.json", TextFileError, "none.json"),
        ("--folder no/such/folder --part files --rows 10", OutputFileError, "no/such/folder"),
    ],
)
def test_mistakes_are_told(line: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        invoke(f"vdb {line}")


def test_files_that_hold_no_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(5, np.float32))
    with pytest.raises(TextFileError, match="must hold floats"):
        data.from_file(tmp_path / "flat.npy")
    with pytest.raises(OutputFileError, match="no graph"):
        report.draw(report.record(report.surroundings(), [], {}), tmp_path / "x.png")


def test_exact_facts(vectors: data.Vectors) -> None:
    found, _ = exact.measure(vectors, 5, (1, 20), (1, 2), 2, ("f32",), 1e9, aim=1e-4)
    ours = [m for m in found if m.engine == "octavo f32"]
    assert len(ours) == 4
    assert all(m.facts["recall"] == 1 and m.facts["overhead"] >= 0 for m in ours)
    assert {"reader"} == set(next(m for m in found if m.engine == engines.STREAM).facts)
