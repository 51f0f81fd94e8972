"""The record of a run: its surroundings, the tables for people, the plot.

Tables, plot and headline are made from the record alone, so that an earlier run can be shown again.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import octavo
from octavo.bench.source import git, processor
from octavo.bench.vdb.bars import RECALLS, curves, graph_shapes, judge, losses, reference, rounds_at_recall, where
from octavo.bench.vdb.engines import STREAM
from octavo.bench.vdb.timing import Measurement, Spread, cases, installed, package, spread, times_better
from octavo.errors import OutputFileError, TextFileError
from octavo.vdb import kernels

PEERS = ("numpy", "faiss-cpu", "usearch", "hnswlib", "sqlite-vec", "apsw", "threadpoolctl")


def surroundings() -> dict[str, Any]:
    """What the figures depend on: commit, processor, kernels, versions, the command line, what else was running."""
    return {
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "kernels": kernels(),
        "python": platform.python_version(),
        "octavo": octavo.__version__,
        "versions": {name: _version(name) for name in PEERS},
        "load_average": _load(),
    }


def libraries() -> list[dict[str, Any]]:
    """The BLAS and OpenMP libraries that are loaded, with the processor that each takes this one for."""
    if not installed("threadpoolctl"):
        return []
    names = ("internal_api", "prefix", "version", "architecture")
    return [{name: each.get(name) for name in names} for each in package("threadpoolctl").threadpool_info()]


def record(around: Mapping[str, Any], measured: Sequence[Measurement], left_out: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the JSON file: `around` (what `surroundings` gave before the run), figures and judgements."""
    judged = judge(measured, around["kernels"])
    return {
        **around,
        "load_average_after": _load(),
        "libraries": libraries(),
        "left_out": dict(left_out),
        "judgements": [
            {"what": j.what, **j.value._asdict(), "bar": j.bar, "at_most": j.at_most, "met": j.met} for j in judged
        ],
        "losses": losses(measured),
        "measurements": [m.to_json() for m in measured],
    }


def load(path: Path) -> dict[str, Any]:
    """The record of an earlier run. Raises TextFileError."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        _measurements(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TextFileError(f"cannot read {path} as a record of octavo bench vdb: {error}") from error
    return found


def save(found: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON. Raises OutputFileError."""
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise OutputFileError(f"cannot write {path}: {error.strerror}") from error


def headline(found: Mapping[str, Any]) -> str:
    """One line of JSON: every figure that has a bar or could have one, the bars that were missed, the losses."""
    short = {
        "figures": {j["what"]: float(f"{j['median']:.4g}") for j in found["judgements"]},
        "missed": [j["what"] for j in found["judgements"] if j["met"] is False],
        "losses": len(found["losses"]),
        "commit": found["commit"],
    }
    return json.dumps(short)


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a record."""
    measured = _measurements(found)
    for table in (*_exact(measured), *_graph(measured), *_calls(measured), *_files(measured), _judgements(found)):
        if table.row_count:
            console.print(table)
    for part, reasons in found["left_out"].items():
        for name, reason in reasons.items():
            console.print(f"not measured ({part}): {name}: {reason}", highlight=False, markup=False)
    if found["losses"]:
        console.print("Where Octavo loses:")
        for loss in found["losses"]:
            console.print(f"  {loss}", highlight=False, markup=False)
    else:
        console.print("Octavo loses nowhere that was measured.")
    load = ", ".join(f"{x:.1f}" for x in found["load_average"])
    around = f"{found['cpu']}, {found['cores']} cores, kernels {found['kernels']}, load before {load}, "
    console.print(around + f"commit {found['commit'] or 'unknown'}", highlight=False, markup=False)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write recall against queries per second of every graph as a PNG. Raises OutputFileError."""
    from matplotlib.figure import Figure

    measured = _measurements(found)
    shapes = graph_shapes(measured)
    if not shapes:
        raise OutputFileError(f"nothing to draw in {path}: no graph was measured")
    figure = Figure(figsize=(7 * len(shapes), 4.5), layout="constrained")
    axes = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axis, shape in zip(axes, shapes, strict=True):
        for name, points in curves(measured, shape).items():
            recalls, speeds = [p.facts["recall"] for p in points], [p.spread for p in points]
            (line,) = axis.plot(recalls, [s.median for s in speeds], marker=".", label=name)
            axis.fill_between(
                recalls, [s.low for s in speeds], [s.high for s in speeds], alpha=0.2, color=line.get_color()
            )
        axis.set(xlabel=f"recall@{shape['k']}", ylabel="queries per second, 1 thread", yscale="log", title=where(shape))
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise OutputFileError(f"cannot write {path}: {error.strerror or error}") from error


def _exact(measured: Sequence[Measurement]) -> Iterator[Table]:
    for case, engines in cases(measured, "exact"):
        against = reference(case)
        single = case["batch"] == 1
        speeds = ["GB/s of f32", "share of streaming"] if single else []
        title = f"exact search: {where(case)}, k = {case['k']}"
        table = _table(title, "queries/s", "quartiles", *speeds, "recall", f"times {against}")
        stream = engines[STREAM]
        for name, m in sorted(engines.items(), key=lambda item: -item[1].spread.median):
            if name == STREAM and not single:
                continue
            gigabytes = m.spread.median * case["rows"] * case["dims"] * 4 / 1e9  # as if all were read as f32
            speed = [f"{gigabytes:.1f}", f"{times_better(m, stream).median:.0%}"] if single else []
            recall = f"{m.facts['recall']:.4f}" if "recall" in m.facts else ""
            times = f"{times_better(m, engines[against]).median:.2f}x" if against in engines and name != STREAM else ""
            table.add_row(name, _number(m.spread.median), _quartiles(m.spread), *speed, recall, times)
        yield table


def _graph(measured: Sequence[Measurement]) -> Iterator[Table]:
    for shape in graph_shapes(measured):
        builds = [(c, e) for c, e in cases(measured, "build") if {**c, "threads": 0} == {**shape, "threads": 0}]
        times = [f"build s, {case['threads']}T" for case, _ in builds]
        at = [f"q/s at {recall}" for recall in RECALLS]
        title = f"HNSW, M = 16, efConstruction = 200: {where(shape)}, k = {shape['k']}; searches on 1 thread"
        table = _table(title, *times, "B/vector", *at)
        speeds = {recall: rounds_at_recall(measured, shape, recall) for recall in RECALLS}
        for name in builds[0][1]:
            took = [f"{engines[name].spread.median:.3g}" for _, engines in builds]
            held = f"{builds[0][1][name].facts['bytes']:,.0f}"
            cells = [_with_quartiles(spread(speeds[r][name])) if name in speeds[r] else "-" for r in RECALLS]
            table.add_row(name, *took, held, *cells)
        yield table


def _calls(measured: Sequence[Measurement]) -> Iterator[Table]:
    for case, engines in cases(measured, "calls"):
        table = _table(f"one call from Python: {where(case)}, k = {case['k']}", "us", "quartiles")
        for name, m in sorted(engines.items(), key=lambda item: item[1].spread.median):
            table.add_row(name, f"{m.spread.median:.2f}", _quartiles(m.spread))
        yield table


def _files(measured: Sequence[Measurement]) -> Iterator[Table]:
    found = cases(measured, "files")
    if not found:
        return
    table = _table(f"files: {where(found[0][0])}, {found[0][0]['bytes'] / 1e6:,.0f} MB", "ms", "quartiles", "GB/s")
    for case, engines in found:
        for name, m in engines.items():
            speed = f"{case['bytes'] / m.spread.median / 1e9:.2f}" if case["what"] != "map" else ""
            milliseconds = Spread(*(1000 * value for value in m.spread))
            name = f"{case['what']}, {name}"
            table.add_row(name, _number(milliseconds.median), _quartiles(milliseconds), speed)
    yield table


def _judgements(found: Mapping[str, Any]) -> Table:
    table = Table("figure", "median", "quartiles", "bar", "", title="against the bars")
    for j in found["judgements"]:
        bar = "" if j["bar"] is None else f"{'<=' if j['at_most'] else '>='} {j['bar']:g}"
        met = {None: "", True: "met", False: "[bold red]missed[/]"}[j["met"]]
        table.add_row(j["what"], f"{j['median']:.3f}", f"{j['low']:.3f} to {j['high']:.3f}", bar, met)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _quartiles(found: Spread) -> str:
    return f"{_number(found.low)} to {_number(found.high)}"


def _with_quartiles(found: Spread) -> str:
    return f"{_number(found.median)} ({_quartiles(found)})"


def _measurements(found: Mapping[str, Any]) -> list[Measurement]:
    return [Measurement.from_json(each) for each in found["measurements"]]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _load() -> tuple[float, ...]:
    return os.getloadavg() if hasattr(os, "getloadavg") else ()
