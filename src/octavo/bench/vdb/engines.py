"""Exact search by every library, each called the way that serves it best.

`faiss` is IndexFlatIP as installed; version 1.15 uses BLAS only for batches of 128,000 queries and more. `faiss, BLAS`
is told to use it from the first query on, and `timing.prepare_process` tells its OpenBLAS of AVX-512, without which it
takes the kernels of a Pentium 4 on processors that it does not know. It is the peer that batches are judged by.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np

from octavo.bench.vdb.data import Floats, Integers
from octavo.bench.vdb.timing import installed, package, rate
from octavo.errors import ConfigError
from octavo.vdb import VectorDatabase

STREAM = "streaming read"


@dataclass(frozen=True)
class Engine:
    """A library with the rows. `search(queries [n, d], threads)` gives indices [n, k]; `prepare` is not timed."""

    name: str
    search: Callable[[Floats, int], Integers]
    prepare: Callable[[int], object] = lambda threads: None
    database: VectorDatabase | None = None  # Octavo's own
    facts: dict[str, Any] = field(default_factory=dict)  # for the record


@dataclass(frozen=True)
class Offer:
    """An engine that could be made, and what it takes."""

    name: str
    make: Callable[[Floats, int], list[Engine]]
    needs: tuple[str, ...] = ()
    copies: float = 1  # of the vectors' bytes, held beside the array itself
    most_rows: int = sys.maxsize


def offers(storages: Sequence[str]) -> list[Offer]:
    """Octavo's engines and all peers; those that matter most come first. Raises ConfigError for no such storage."""
    if unknown := [s for s in storages if s not in _COPIES]:
        raise ConfigError(f"storage must be one of {', '.join(_COPIES)}, not {unknown[0]!r}")
    ours = [
        Offer(octavo_name(s, m), partial(_octavo, storage=s, metric=m), copies=_COPIES[s])
        for m in ("dot", "cosine", "euclidean")
        for s in storages
    ]
    by_dot = [o for o in ours if "," not in o.name]
    return [
        *by_dot,
        Offer("numpy", _numpy, ("threadpoolctl",), 0),
        Offer("faiss", _faiss, ("faiss", "threadpoolctl")),
        *(o for o in ours if o not in by_dot),
        Offer("usearch", _usearch, ("usearch",), 0),
        Offer("hnswlib, brute force", _hnswlib, ("hnswlib",)),
        Offer("sqlite-vec", _sqlite, ("sqlite_vec",), 2, most_rows=100_000),
    ]


_COPIES = {"f32": 1.0, "f32+i8": 1.25, "f16": 0.5, "bf16": 0.5, "i8": 0.25}


def octavo_name(storage: str, metric: str = "dot") -> str:
    """What Octavo's engine of a storage and a metric is called in tables; "dot" goes without saying."""
    return f"octavo {storage}" + ("" if metric == "dot" else f", {metric}")


def make(offered: Iterable[Offer], x: Floats, k: int, budget: float) -> tuple[list[Engine], dict[str, str]]:
    """The engines that can be had within `budget` bytes, and why each of the others was left out."""
    engines, left_out = [], {}
    for offer in offered:
        missing = [name for name in offer.needs if not installed(name)]
        size = offer.copies * x.nbytes
        if missing:
            left_out[offer.name] = f"{', '.join(missing)} not installed (pip install octavo[bench])"
        elif len(x) > offer.most_rows:
            left_out[offer.name] = f"too slow beyond {offer.most_rows:,} rows"
        elif size > budget:
            left_out[offer.name] = f"its {size / 1e9:.1f} GB do not fit beside the others; see --memory"
        elif offer.name == "sqlite-vec" and not _loads_extensions():
            left_out[offer.name] = "this Python's sqlite3 loads no extensions and apsw is not installed"
        else:
            budget -= size
            engines += offer.make(x, k)
    return engines, left_out


def stream(x: Floats, threads: int, aim: float) -> Engine:
    """The fastest plain read of the rows' own bytes that numpy can do, as a "search" that finds nothing.

    Tried are reductions that leave a processor little to do but read (maximum as float32 and as uint64, minimum as
    uint8), each over as many pieces as there are threads, and, where threadpoolctl limits it, BLAS's product with a
    vector on its own threads. Each runs three times for `aim` seconds; the fastest serves in all rounds. The sum is not
    among them: numpy adds in pairs, at half the speed of memory.
    """
    cuts = [*(x.size * i // threads // 2 * 2 for i in range(threads)), x.size]  # whole pairs of floats
    pieces = [x.reshape(-1)[a:b] for a, b in pairwise(cuts)]
    pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
    ones = np.ones(x.shape[1], np.float32)

    def split(reduce: Callable[[Any], object]) -> None:
        others = [] if pool is None else [pool.submit(reduce, piece) for piece in pieces[1:]]
        reduce(pieces[0])
        for other in others:
            other.result()

    readers: dict[str, Callable[[], object]] = {
        "float32 maximum": lambda: split(lambda a: a.max()),
        "uint8 minimum": lambda: split(lambda a: a.view(np.uint8).min()),
        "uint64 maximum": lambda: split(lambda a: a[: len(a) // 2 * 2].view(np.uint64).max(initial=0)),
    }
    if installed("threadpoolctl"):
        readers["matrix times vector"] = lambda: x @ ones

    def speed(name: str) -> float:
        task = rate(lambda _: readers[name](), aim)
        return sorted(task() for _ in range(3))[1]

    fastest = max(readers, key=speed)
    read, none = readers[fastest], np.empty((0, 0), np.int64)

    def search(queries: Floats, _: int) -> Integers:
        read()
        return none

    return Engine(STREAM, search, facts={"reader": fastest})


def _octavo(x: Floats, k: int, storage: str, metric: str) -> list[Engine]:
    # mypy knows the literals of the constructor, and these are checked by it
    db = VectorDatabase(x.shape[1], metric=cast(Any, metric), storage=cast(Any, storage))
    db.add(x)
    return [
        Engine(
            octavo_name(storage, metric),
            lambda queries, _: np.asarray(db.search(queries, k=k).indices),
            db.set_threads,
            db,
        )
    ]


def _numpy(x: Floats, k: int) -> list[Engine]:
    def search(queries: Floats, threads: int) -> Integers:
        scores = queries @ x.T
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        return np.take_along_axis(best, order, 1)

    return [Engine("numpy", search)]


def _faiss(x: Floats, k: int) -> list[Engine]:
    faiss = package("faiss")
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    usual = faiss.cvar.distance_compute_blas_threshold

    def search(queries: Floats, threads: int) -> Integers:
        return cast(Integers, index.search(queries, k)[1])

    def by_blas(queries: Floats, threads: int) -> Integers:
        faiss.cvar.distance_compute_blas_threshold = 1
        try:
            return search(queries, threads)
        finally:
            faiss.cvar.distance_compute_blas_threshold = usual

    threads = faiss.omp_set_num_threads
    return [Engine("faiss", search, threads), Engine("faiss, BLAS", by_blas, threads)]


def _usearch(x: Floats, k: int) -> list[Engine]:
    usearch = package("usearch.index")

    def search(queries: Floats, threads: int) -> Integers:
        found = usearch.search(x, queries, k, usearch.MetricKind.IP, exact=True, threads=threads)
        return np.asarray(found.keys).reshape(len(queries), k).astype(np.int64)

    return [Engine("usearch", search)]


def _hnswlib(x: Floats, k: int) -> list[Engine]:
    index = package("hnswlib").BFIndex("ip", x.shape[1])
    index.init_index(len(x))
    index.add_items(x)
    return [
        Engine(
            "hnswlib, brute force",
            lambda queries, threads: index.knn_query(queries, k, num_threads=min(threads, len(queries)))[0].astype(
                np.int64
            ),
        )
    ]


def _sqlite(x: Floats, k: int) -> list[Engine]:
    execute = sqlite_vec(x)

    def search(queries: Floats, threads: int) -> Integers:
        asked = "select rowid from rows where e match ? and k = ?"
        return np.array([[row for (row,) in execute(asked, (q.tobytes(), k))] for q in queries], np.int64)

    return [Engine("sqlite-vec", search, facts={"threads": 1})]


def sqlite_vec(x: Floats) -> Callable[..., Any]:
    """The `execute` of a database in memory with a table `rows` of column `e`, by the sqlite that loads extensions."""
    path = package("sqlite_vec").loadable_path()
    connect = package("apsw").Connection if installed("apsw") else package("sqlite3").connect
    connection = connect(":memory:")
    connection.enable_load_extension(True)
    connection.load_extension(path)
    connection.execute(f"create virtual table rows using vec0(e float[{x.shape[1]}] distance_metric=cosine)")
    connection.execute("begin")
    connection.executemany("insert into rows(rowid, e) values (?, ?)", ((i, v.tobytes()) for i, v in enumerate(x)))
    connection.execute("commit")
    return cast(Callable[..., Any], connection.execute)


def _loads_extensions() -> bool:
    import sqlite3

    return installed("apsw") or hasattr(sqlite3.Connection, "enable_load_extension")
