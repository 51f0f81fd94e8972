"""What the measurements say: the ratios that matter, the bars that the project has set itself, and every loss.

A bar holds for one size of data; ratios at other sizes are reported without a bar.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.vdb.engines import STREAM, octavo_name
from octavo.bench.vdb.graph import at_recall
from octavo.bench.vdb.overhead import COPY
from octavo.bench.vdb.timing import Measurement, Spread, cases, spread, times_better

RECALLS = (0.9, 0.95, 0.99)
STORAGES = ("f32", "f32+i8")  # those whose answers are exact
# by threads
SHARE = {1: 0.90, 2: 0.85}
SINGLE = {"f32": {1: 1.05, 2: 1.8}, "f32+i8": {1: 3.5, 2: 6.0}}
BATCH = {"f32": 1.5, "f32+i8": 4.5}
BATCH_WITHOUT_AMX = {"f32": 1.2}
METRICS = 0.9
GRAPH = {"f32": 1.1, "f32+i8": 1.9}  # at recall 0.95 and 0.99

Engines = Mapping[str, Measurement]


@dataclass(frozen=True)
class Judgement:
    """A figure and its bar: at least, or `at_most`; None where there is no bar for this size."""

    what: str
    value: Spread
    bar: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None without a bar."""
        if self.bar is None:
            return None
        return self.value.median <= self.bar if self.at_most else self.value.median >= self.bar


def judge(measured: Sequence[Measurement], kernels: str) -> list[Judgement]:
    """Every figure that has or could have a bar; `kernels` are those that were in use."""
    return [*_exact(measured, kernels), *_graph(measured), *_calls(measured), *_files(measured)]


def where(case: Mapping[str, Any]) -> str:
    """A case in words, such as 'single query, 1,000 x 64, 1 thread'."""
    words = [f"{case['rows']:,} x {case['dims']}"]
    if "batch" in case:
        words.insert(0, "single query" if case["batch"] == 1 else f"batch of {case['batch']}")
    if case.get("data", "random") != "random":
        words.append(case["data"])
    if "threads" in case:
        words.append("1 thread" if case["threads"] == 1 else f"{case['threads']} threads")
    return ", ".join(words)


def reference(case: Mapping[str, Any]) -> str:
    """The peer that an exact search is judged by."""
    return "faiss" if case["batch"] == 1 else "faiss, BLAS"


def curves(measured: Sequence[Measurement], shape: Mapping[str, Any]) -> dict[str, list[Measurement]]:
    """Every engine's searches in the graph of these vectors, by ascending ef."""
    found: dict[str, list[Measurement]] = {}
    for case, engines in cases(measured, "graph"):
        if {**case, "ef": None} == {**shape, "ef": None}:
            for name, m in engines.items():
                found.setdefault(name, []).append(m)
    return found


def rounds_at_recall(
    measured: Sequence[Measurement], shape: Mapping[str, Any], recall: float
) -> dict[str, list[float]]:
    """Queries per second at a recall, in every round, of each engine that gets there with these vectors."""
    found = {}
    for name, points in curves(measured, shape).items():
        rounds = range(len(points[0].samples))
        speeds = [at_recall([(p.facts["recall"], p.samples[r]) for p in points], recall) for r in rounds]
        found[name] = [s for s in speeds if s is not None]
    return {name: speeds for name, speeds in found.items() if speeds}


def graph_shapes(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The vectors that graphs were searched in: cases without their ef."""
    shapes: list[dict[str, Any]] = []
    for case, _ in cases(measured, "graph"):
        shape = {name: value for name, value in case.items() if name != "ef"}
        if shape not in shapes:
            shapes.append(shape)
    return shapes


def losses(measured: Sequence[Measurement]) -> list[str]:
    """Where one of Octavo's engines is slower, or larger, than a peer that answers as well."""
    found = []
    for part in ("exact", "build", "calls"):
        for case, engines in cases(measured, part):
            ours = [m for name, m in engines.items() if _is_ours(name) and "cosine" not in name and "eucl" not in name]
            theirs = [m for name, m in engines.items() if not _is_ours(name) and name != STREAM]
            for a in ours:
                for b in theirs:
                    as_good = b.facts.get("recall", 1) >= a.facts.get("recall", 1)
                    times = times_better(a, b).median
                    if as_good and times < 1:
                        verb = {"build": "builds at", "calls": "is called at"}.get(part, "has")
                        found.append(f"{a.engine} {verb} {times:.2f} the speed of {b.engine} ({where(case)})")
                    if part == "build" and a.facts["bytes"] > b.facts["bytes"] > 0 and case["threads"] == 1:
                        size = f"{a.facts['bytes']:.0f} B a vector, {b.engine} {b.facts['bytes']:.0f}"
                        found.append(f"{a.engine} holds {size} ({where(case)})")
    for shape in graph_shapes(measured):
        for recall in RECALLS:
            found += _graph_losses(rounds_at_recall(measured, shape, recall), f"recall {recall}, {where(shape)}")
    return found


def _graph_losses(speeds: Mapping[str, list[float]], place: str) -> Iterator[str]:
    for storage in STORAGES:
        ours = speeds.get(octavo_name(storage))
        for name, theirs in speeds.items():
            if _is_ours(name):
                continue
            if ours is None:
                yield f"{octavo_name(storage)} does not reach what {name} does ({place})"
            elif (times := _paired(ours, theirs).median) < 1:
                yield f"{octavo_name(storage)} has {times:.2f} the speed of {name} ({place})"


def _exact(measured: Sequence[Measurement], kernels: str) -> Iterator[Judgement]:
    told: set[tuple[str, int, int]] = set()
    for case, engines in cases(measured, "exact"):
        threads, place, size = case["threads"], where(case), (case["rows"], case["dims"])
        plain, stream, peer = engines.get(octavo_name("f32")), engines[STREAM], engines.get(reference(case))
        if plain is not None and case["batch"] == 1:
            bar = SHARE.get(threads) if size == (1_000_000, 384) else None
            yield Judgement(f"f32, share of the streaming read: {place}", times_better(plain, stream), bar)
        for storage in STORAGES:
            ours = engines.get(octavo_name(storage))
            if ours is None:
                continue
            if peer is not None:
                bar = _speed_bar(storage, case, kernels) if size == (100_000, 384) else None
                yield Judgement(f"{storage}, times {peer.engine}: {place}", times_better(ours, peer), bar)
            for metric in ("cosine", "euclidean"):
                if other := engines.get(octavo_name(storage, metric)):
                    what = f"{storage}, {metric} against dot product: {place}"
                    yield Judgement(what, times_better(other, ours), METRICS if case["rows"] >= 100_000 else None)
            if (storage, *size) not in told:
                told.add((storage, *size))
                bytes_ = spread([ours.facts["overhead"]])
                bar = 16 if case["rows"] >= 100_000 else None
                yield Judgement(
                    f"{storage}, bytes per vector beyond the vectors: {where_size(case)}", bytes_, bar, True
                )
        exact = [m.facts["recall"] for name, m in engines.items() if name.split(",")[0] in map(octavo_name, STORAGES)]
        if exact:
            yield Judgement(f"lowest recall of f32 and f32+i8: {place}", spread([min(exact)]), 1.0)


def where_size(case: Mapping[str, Any]) -> str:
    """A case's size in words."""
    return f"{case['rows']:,} x {case['dims']}"


def _speed_bar(storage: str, case: Mapping[str, Any], kernels: str) -> float | None:
    if case["batch"] == 1:
        return SINGLE[storage].get(case["threads"])
    return (BATCH if kernels == "amx" else BATCH_WITHOUT_AMX).get(storage) if case["batch"] == 100 else None


def _graph(measured: Sequence[Measurement]) -> Iterator[Judgement]:
    for shape in graph_shapes(measured):
        large = shape["rows"] >= 100_000 and shape["data"] != "clusters"
        for recall in RECALLS:
            speeds = rounds_at_recall(measured, shape, recall)
            peers = [speeds[name] for name in ("hnswlib", "usearch") if name in speeds]
            if not peers:
                continue
            best = [max(of_round) for of_round in zip(*peers, strict=False)]
            for storage in STORAGES:
                if speed := speeds.get(octavo_name(storage)):
                    what = f"HNSW {storage}, times the better of hnswlib and usearch at recall {recall}: {where(shape)}"
                    yield Judgement(what, _paired(speed, best), GRAPH[storage] if large and recall > 0.9 else None)
    for case, engines in cases(measured, "build"):
        for storage in STORAGES:
            ours, peer = engines.get(octavo_name(storage)), engines.get("hnswlib")
            if ours is not None and peer is not None:
                what = f"HNSW {storage}, build, times hnswlib: {where(case)}"
                yield Judgement(what, times_better(ours, peer), 1.0 if case["rows"] >= 100_000 else None)


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return spread([a / b for a, b in zip(ours, theirs, strict=False)])


def _calls(measured: Sequence[Measurement]) -> Iterator[Judgement]:
    for case, engines in cases(measured, "calls"):
        for name, m in engines.items():
            if _is_ours(name):
                bar = 2.0 if name == octavo_name("f32") else None
                yield Judgement(f"call of {name}, us: {where(case)}", m.spread, bar, True)


def _files(measured: Sequence[Measurement]) -> Iterator[Judgement]:
    for case, engines in cases(measured, "files"):
        large = case["rows"] >= 1_000_000
        ours, place = engines[octavo_name("f32")], where(case)
        if COPY in engines:
            what = f"{case['what']}, times copying the same bytes: {place}"
            yield Judgement(what, times_better(ours, engines[COPY]), 0.5 if large else None)
        elif case["what"] == "map":
            milliseconds = Spread(*(1000 * value for value in ours.spread))
            yield Judgement(f"mmap open, ms: {place}", milliseconds, 10.0 if large else None, True)


def _is_ours(name: str) -> bool:
    return name.startswith("octavo")
