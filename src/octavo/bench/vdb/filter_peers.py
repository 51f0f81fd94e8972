"""Searches with a filter by value against chroma and sqlite-vec: `python -m octavo.bench.vdb.filter_peers`.

Peers want an environment of their own, into which Octavo need not be installed:

    python3 -m venv peers && peers/bin/pip install chromadb==1.5.9 sqlite-vec==0.1.9 apsw==3.54.1.0 numpy
    PYTHONPATH=src peers/bin/python -m octavo.bench.vdb.filter_peers --out bench/results-vdb-filters.json

All have the same rows and the same filter, `place < n`, which half, a hundredth or a ten-thousandth of the rows pass;
each is asked through its Python interface, one query after the other, the engines in turn. "new" is a filter that was
never asked before, "again" one that was. Octavo has one thread; chroma has as many as it likes. Prints a table of
queries a second, the share of the exact answer that is found, and Octavo's multiple of each peer; a last line of JSON.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from octavo.bench.vdb.data import clusters
from octavo.vdb import VectorDatabase, kernels

DIMENSIONS, K = 128, 10
SHARES = (0.5, 0.01, 0.0001)
Search = Callable[[Any, int], list[int]]  # query [D], rows with a place below this pass: places of the nearest


def octavo(vectors: Any, places: Any, index: Any) -> Search:
    """Octavo with codes, flat or with a graph."""
    db = VectorDatabase(DIMENSIONS, "euclidean", storage="f32+i8", index=index, threads=1)
    db.add(vectors, metadata=[{"place": int(place)} for place in places])

    def search(query: Any, limit: int) -> list[int]:
        return [int(places[i]) for i in db.search(query, K, filter={"place": {"$lt": limit}}).indices]

    return search


def chroma(vectors: Any, places: Any, folder: Path) -> Search:
    """chroma's HNSW, in this process, with its defaults."""
    chromadb: Any = importlib.import_module("chromadb")
    settings = chromadb.config.Settings(anonymized_telemetry=False)
    collection = chromadb.PersistentClient(str(folder / "chroma"), settings=settings).create_collection("rows")
    for start in range(0, len(vectors), 5000):
        some = [int(place) for place in places[start : start + 5000]]
        collection.add(
            ids=[str(place) for place in some],
            embeddings=vectors[start : start + 5000],
            metadatas=[{"place": place} for place in some],
        )

    def search(query: Any, limit: int) -> list[int]:
        found = collection.query(
            query_embeddings=query[None], n_results=K, where={"place": {"$lt": limit}}, include=["distances"]
        )
        return [int(name) for name in found["ids"][0]]

    return search


def sqlite_vec(vectors: Any, places: Any, folder: Path) -> Search:
    """sqlite-vec's table with a metadata column, in memory: it scans."""
    extension: Any = importlib.import_module("sqlite_vec")
    connection = importlib.import_module("apsw").Connection(":memory:")
    connection.enable_load_extension(True)
    connection.load_extension(extension.loadable_path())
    connection.execute(f"create virtual table rows using vec0(vector float[{DIMENSIONS}], place integer)")
    with connection:
        cursor = connection.cursor()
        inserted = ((int(p), v.tobytes(), int(p)) for v, p in zip(vectors, places, strict=True))
        cursor.executemany("insert into rows(rowid, vector, place) values (?, ?, ?)", inserted)

    def search(query: Any, limit: int) -> list[int]:
        asked = "select rowid from rows where vector match ? and k = ? and place < ? order by distance"
        return [row[0] for row in connection.execute(asked, (query.tobytes(), K, limit))]

    return search


def exact(vectors: Any, places: Any, query: Any, limit: int) -> set[int]:
    """The places of the K nearest rows that pass."""
    passing = np.flatnonzero(places < limit)
    distances = ((vectors[passing].astype(np.float64) - query) ** 2).sum(1)
    return {int(places[i]) for i in passing[np.argsort(distances, kind="stable")[:K]]}


def measure(engines: dict[str, Search], vectors: Any, places: Any, queries: Any, limits: list[int]) -> dict[str, Any]:
    """Queries a second and recall of each engine; each query has its limit, and the engines are asked in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    found: dict[str, list[float]] = {name: [] for name in engines}
    for search in engines.values():
        search(queries[0], limits[0])
    for query, limit in zip(queries, limits, strict=True):
        right = exact(vectors, places, query, limit)
        for name, search in engines.items():
            began = time.perf_counter()
            answer = search(query, limit)
            seconds[name].append(time.perf_counter() - began)
            found[name].append(len(right & set(answer)) / max(1, len(right)))
    return {
        name: {"queries/s": 1 / statistics.median(seconds[name]), "recall": statistics.mean(found[name])}
        for name in engines
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--queries", type=int, default=30)
    options.add_argument("--out", type=Path, help="also write the record here")
    asked = options.parse_args()
    _, vectors, queries = clusters(asked.rows, DIMENSIONS, asked.queries)
    places = np.random.default_rng(2).permutation(asked.rows)
    record: dict[str, Any] = {
        "command": sys.argv[1:],
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "kernels": kernels(),
        },
        "versions": {name: version(name) for name in ("chromadb", "sqlite-vec", "apsw", "numpy")},
        "rows": asked.rows,
        "results": {},
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        engines = {
            "octavo flat": octavo(vectors, places, "flat"),
            "octavo hnsw": octavo(vectors, places, "hnsw"),
            "chroma": chroma(vectors, places, Path(folder)),
            "sqlite-vec": sqlite_vec(vectors, places, Path(folder)),
        }
        for share in SHARES:
            limit = int(asked.rows * share)
            for word, step in (("again", 0), ("new", 1)):
                case, limits = f"passing {share:.2%}, {word}", [limit + step * i for i in range(len(queries))]
                results = record["results"][case] = measure(engines, vectors, places, queries, limits)
                for name, result in results.items():
                    peers = " ".join(
                        f"{result['queries/s'] / results[peer]['queries/s']:8.1f}x {peer}"
                        for peer in ("chroma", "sqlite-vec")
                        if name.startswith("octavo")
                    )
                    print(
                        f"{case:24} {name:12} {result['queries/s']:10.1f}/s {result['recall']:6.3f} {peers}", flush=True
                    )
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
