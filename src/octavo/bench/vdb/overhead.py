"""What is paid beside the search itself: one call from Python, and files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from octavo.bench.vdb.data import Floats, Vectors, random_directions
from octavo.bench.vdb.engines import octavo_name, sqlite_vec
from octavo.bench.vdb.timing import Measurement, alternate, blas_threads, installed, package, rate, seconds
from octavo.errors import OutputFileError
from octavo.vdb import VectorDatabase

COPY = "copy"
SAMPLE_AIM = 0.05  # seconds that one sample of calls takes


def calls(
    dims: Sequence[int], k: int, rounds: int, aim: float = SAMPLE_AIM
) -> tuple[list[Measurement], dict[str, str]]:
    """Microseconds of a call that searches ten rows for one query [d], so that nearly all of it is overhead.

    Peers answer with numpy arrays; Octavo's `Hits` are memoryviews until asked, so a second row counts the array too.
    """
    measured: list[Measurement] = []
    left_out: dict[str, str] = {}
    for width in dims:
        vectors = random_directions(10, width, 1)
        found, missing = _callers(vectors, k)
        left_out |= missing
        case = {"rows": 10, "dims": width, "k": k}
        with blas_threads(1):
            tasks = {name: rate(lambda _, call=call: call(), aim) for name, call in found.items()}  # type: ignore[misc]
            for name, samples in alternate(tasks, rounds).items():
                measured.append(Measurement("calls", case, name, "us", [1e6 / s for s in samples]))
    return measured, left_out


def _callers(vectors: Vectors, k: int) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    x, q = vectors.rows, vectors.queries[0]
    db = VectorDatabase(len(q), metric="dot", threads=1)
    db.add(x)
    search = db.search
    callers: dict[str, Callable[[], object]] = {
        octavo_name("f32"): partial(search, q, k),
        octavo_name("f32") + ", to an array": lambda: np.asarray(search(q, k).indices),
        "numpy": lambda: np.argsort(-(x @ q))[:k],
    }
    left_out = {}
    peers = {"faiss": _faiss, "usearch": _usearch, "hnswlib": _hnswlib, "sqlite-vec": _sqlite}
    for name, make in peers.items():
        if not installed(name.replace("-", "_")):
            left_out[name] = "not installed (pip install octavo[bench])"
            continue
        try:
            callers[name] = make(x, q, k)
        except AttributeError:  # an sqlite3 without load_extension
            left_out[name] = "this Python's sqlite3 loads no extensions and apsw is not installed"
    return callers, left_out


def _faiss(x: Floats, q: Floats, k: int) -> Callable[[], object]:
    faiss = package("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(len(q))
    index.add(x)
    query = q[None]
    return partial(index.search, query, k)


def _usearch(x: Floats, q: Floats, k: int) -> Callable[[], object]:
    index = package("usearch.index").Index(ndim=len(q), metric="ip", dtype="f32")
    index.add(np.arange(len(x)), x)
    return partial(index.search, q, k, threads=1)


def _hnswlib(x: Floats, q: Floats, k: int) -> Callable[[], object]:
    index = package("hnswlib").BFIndex("ip", len(q))
    index.init_index(len(x))
    index.add_items(x)
    return partial(index.knn_query, q, k, num_threads=1)


def _sqlite(x: Floats, q: Floats, k: int) -> Callable[[], object]:
    execute = sqlite_vec(x)
    asked = (q.tobytes(), k)
    return lambda: list(execute("select rowid, distance from rows where e match ? and k = ?", asked))


def files(rows: int, dims: int, rounds: int, folder: Path | None = None) -> list[Measurement]:
    """Seconds to save, load and map a flat f32 database, and to copy as many bytes the plainest way.

    A save is judged by writing and fsyncing the same bytes to a new file in the same folder, a load (which verifies
    every checksum) by reading the cached file into fresh memory. `map` is the opening alone, before any checksum;
    `map, search` is the first search in it, which reads every row. Raises OutputFileError.
    """
    try:
        with TemporaryDirectory(prefix="octavo-bench-", dir=folder) as name:
            return _files(random_directions(rows, dims, 1), rounds, Path(name))
    except OSError as error:
        raise OutputFileError(f"cannot write to {folder or gettempdir()}: {error.strerror or error}") from error


def _files(vectors: Vectors, rounds: int, folder: Path) -> list[Measurement]:
    db = VectorDatabase(vectors.rows.shape[1], metric="dot")
    db.add(vectors.rows)
    path, copy = folder / "rows.vdb", folder / "copy"
    db.save(path)
    contents = path.read_bytes()
    mapped: list[float] = []

    def map_and_search() -> float:
        opened: list[VectorDatabase] = []
        mapped.append(seconds(lambda: opened.append(VectorDatabase.open(path, mode="mmap"))))
        return seconds(lambda: opened[0].search(vectors.queries, k=10))

    tasks: dict[str, Callable[[], float]] = {
        "save": lambda: seconds(lambda: db.save(path)),
        "save, copy": partial(_write, copy, contents),
        "load": lambda: seconds(lambda: VectorDatabase.open(path)),
        "load, copy": lambda: seconds(lambda: _read(path)),
        "map, search": map_and_search,
    }
    samples = alternate(tasks, rounds)
    samples["map"] = mapped
    base: dict[str, Any] = {"rows": len(vectors.rows), "dims": vectors.rows.shape[1], "bytes": len(contents)}
    return [
        Measurement("files", {**base, "what": what.removesuffix(", copy")}, _by(what), "s", found)
        for what, found in samples.items()
    ]


def _by(task: str) -> str:
    return COPY if task.endswith(COPY) else octavo_name("f32")


def _write(path: Path, contents: bytes) -> float:
    path.unlink(missing_ok=True)  # a new file, as a save makes one

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            view = memoryview(contents)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())

    return seconds(write)


def _read(path: Path) -> object:
    with path.open("rb", buffering=0) as file:
        into = np.empty(path.stat().st_size, np.uint8)
        view = into.data
        while view and (got := file.readinto(view)):
            view = view[got:]
    return into
