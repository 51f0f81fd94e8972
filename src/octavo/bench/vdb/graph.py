"""HNSW with M = 16 and efConstruction = 200, of every library that has it: time to build, bytes, recall and speed."""

import ctypes
import gc
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from octavo.bench.vdb.data import Floats, Integers, Truth, Vectors
from octavo.bench.vdb.engines import octavo_name
from octavo.bench.vdb.timing import Measurement, alternate, blas_threads, installed, package, rate, seconds
from octavo.vdb import VectorDatabase

LINKS, EFFORT = 16, 200
SAMPLE_AIM = 0.1  # seconds that one sample takes at least
EFS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


@dataclass(frozen=True)
class Graph:
    """An empty index: `build(x, threads)` fills it, `search(queries, ef)` gives indices [n, k], on one thread."""

    build: Callable[[Floats, int], object]
    search: Callable[[Floats, int], Integers]
    own_bytes: Callable[[], int] | None = None  # what the library itself says it holds


def measure(
    vectors: Vectors,
    k: int,
    threads: Sequence[int],
    rounds: int,
    builds: int,
    efs: Sequence[int] = EFS,
    aim: float = SAMPLE_AIM,
) -> tuple[list[Measurement], dict[str, str]]:
    """Builds on each number of threads and searches on one, by Euclidean distance; and what was left out.

    Facts of a build: `bytes`, per vector, by which the process grew, and `own_bytes`, by the library's own count.
    Facts of a search: `recall`. The index that is searched is the first that was built on the first of `threads`.
    """
    makers, left_out = _makers(vectors.rows.shape[1], k)
    truth = Truth(vectors, k, euclidean=True)
    kept: dict[str, Graph] = {}
    measured = []
    shape = {"data": vectors.name, "rows": len(vectors.rows), "dims": vectors.rows.shape[1], "k": k}
    with blas_threads(1):
        for count in threads:
            measured += _build({**shape, "threads": count}, makers, vectors.rows, builds, kept)
        kept = {name: kept[name] for name in makers}  # in the order of the tables
        for ef in efs:
            recalls = {name: truth.recall(graph.search(vectors.queries, ef)) for name, graph in kept.items()}
            tasks = {name: _search(graph, vectors.queries, ef, aim) for name, graph in kept.items()}
            measured += [
                Measurement("graph", {**shape, "ef": ef}, name, "queries/s", samples, {"recall": recalls[name]})
                for name, samples in alternate(tasks, rounds).items()
            ]
    return measured, left_out


def at_recall(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Speed at a recall, from points (recall, speed) by ascending ef; the logarithm of the speed is interpolated.

    The speed of the first point if even that is better than asked; None if none is as good.
    """
    if curve[0][0] >= target:
        return curve[0][1]
    for (r0, v0), (r1, v1) in pairwise(curve):
        if r0 < target <= r1:
            return math.exp(math.log(v0) + (math.log(v1) - math.log(v0)) * (target - r0) / (r1 - r0))
    return None


def _build(
    case: dict[str, Any], makers: dict[str, Callable[[], Graph]], x: Floats, builds: int, kept: dict[str, Graph]
) -> list[Measurement]:
    """Builds every index `builds` times, alternating, and keeps the first of each in `kept`."""
    facts: dict[str, dict[str, Any]] = {}

    def task(name: str) -> Callable[[], float]:
        def once() -> float:
            before = _resident()
            graph = makers[name]()
            took = seconds(lambda: graph.build(x, case["threads"]))
            if name not in facts:
                own = {} if graph.own_bytes is None else {"own_bytes": graph.own_bytes() / len(x)}
                facts[name] = {"bytes": (_resident() - before) / len(x), **own}
            kept.setdefault(name, graph)
            return took

        return once

    samples = alternate({name: task(name) for name in makers}, builds)
    return [Measurement("build", case, name, "s", samples[name], facts[name]) for name in makers]


def _search(graph: Graph, queries: Floats, ef: int, aim: float) -> Callable[[], float]:
    batches = rate(lambda _: graph.search(queries, ef), aim)
    return lambda: len(queries) * batches()


def _makers(dims: int, k: int) -> tuple[dict[str, Callable[[], Graph]], dict[str, str]]:
    makers: dict[str, Callable[[], Graph]] = {
        octavo_name(storage): partial(_octavo, dims, k, storage) for storage in ("f32", "f32+i8")
    }
    peers = {"hnswlib": _hnswlib, "usearch": _usearch, "faiss": _faiss}
    here = [name for name in peers if installed(name)]
    makers |= {name: partial(peers[name], dims, k) for name in here}
    return makers, {name: "not installed (pip install octavo[bench])" for name in peers if name not in here}


def _octavo(dims: int, k: int, storage: str) -> Graph:
    # mypy knows the literals of the constructor
    db = VectorDatabase(
        dims, metric="euclidean", storage=cast(Any, storage), index="hnsw", links=LINKS, build_effort=EFFORT
    )

    def build(x: Floats, threads: int) -> None:
        db.set_threads(threads)
        db.add(x)
        db.set_threads(1)

    return Graph(
        build, lambda queries, ef: np.asarray(db.search(queries, k=k, effort=ef).indices), lambda: db.info().bytes
    )


def _hnswlib(dims: int, k: int) -> Graph:
    index = package("hnswlib").Index("l2", dims)

    def build(x: Floats, threads: int) -> None:
        index.init_index(len(x), M=LINKS, ef_construction=EFFORT)
        index.add_items(x, num_threads=threads)

    def search(queries: Floats, ef: int) -> Integers:
        index.set_ef(ef)
        return cast(Integers, index.knn_query(queries, k, num_threads=1)[0].astype(np.int64))

    return Graph(build, search)


def _usearch(dims: int, k: int) -> Graph:
    index = package("usearch.index").Index(
        ndim=dims, metric="l2sq", dtype="f32", connectivity=LINKS, expansion_add=EFFORT
    )

    def search(queries: Floats, ef: int) -> Integers:
        index.expansion_search = ef
        return np.asarray(index.search(queries, k, threads=1).keys).astype(np.int64)

    return Graph(
        lambda x, threads: index.add(np.arange(len(x), dtype=np.uint64), x, threads=threads),
        search,
        lambda: int(index.memory_usage),
    )


def _faiss(dims: int, k: int) -> Graph:
    faiss = package("faiss")
    index = faiss.IndexHNSWFlat(dims, LINKS)
    index.hnsw.efConstruction = EFFORT

    def build(x: Floats, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        index.add(x)
        faiss.omp_set_num_threads(1)

    def search(queries: Floats, ef: int) -> Integers:
        index.hnsw.efSearch = ef
        return cast(Integers, index.search(queries, k)[1])

    return Graph(build, search)


def _resident() -> int:
    """Bytes of this process in memory, after giving freed ones back; 0 where /proc does not say."""
    gc.collect()
    if sys.platform != "linux":
        return 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
