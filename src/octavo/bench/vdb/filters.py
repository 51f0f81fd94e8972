"""What filtering by value costs: `python -m octavo.bench.vdb.filters [--rows N] [--graph-rows N]`.

Each query is timed with a filter and without, one after the other. The table says how long a filtered search takes as a
multiple of the unfiltered one: where the filter was asked before ("again"), and where it is another for every query
("new"); and for the graph which share of the exact answer it finds. One thread; prints a table and a last line of JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from octavo.bench.vdb.data import clusters
from octavo.vdb import VectorDatabase

DIMENSIONS, K, QUERIES = 128, 10, 25
SHARES = (0.5, 0.01, 0.0001)


def database(vectors: Any, places: Any, **settings: Any) -> VectorDatabase:
    """Rows with their place in a random order, and a language that half of them have."""
    db = VectorDatabase(DIMENSIONS, threads=1, **settings)
    for start in range(0, len(vectors), 50_000):
        metadata = [{"place": int(p), "lang": "fr" if p % 2 else "ru"} for p in places[start : start + 50_000]]
        db.add(vectors[start : start + 50_000], metadata=metadata)
    return db


def times(db: VectorDatabase, queries: Any, filter: Any, again: bool) -> float:
    """How many times as long a filtered search takes as an unfiltered one: the median over queries."""
    db.search(queries[0], K, filter=filter)  # columns are made
    ratios = []
    for i, query in enumerate(queries):
        filter = filter if again else {**filter, "lang": {"$ne": str(i)}}  # which nothing is
        began = time.perf_counter()
        db.search(query, K)
        between = time.perf_counter()
        db.search(query, K, filter=filter)
        ratios.append((time.perf_counter() - between) / (between - began))
    return float(statistics.median(ratios))


def recall(db: VectorDatabase, queries: Any, filter: Any) -> float:
    """The share of the exact answer to a filtered search that the graph finds."""
    found = db.search(queries, K, filter=filter)
    exact = db.search(queries, K, filter=filter, exact=True)
    shared = sum(len(set(a.indices) & set(b.indices)) for a, b in zip(found, exact, strict=True))
    return float(shared / sum(exact.counts))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--graph-rows", type=int, default=100_000)
    asked = options.parse_args()
    _, vectors, queries = clusters(asked.rows, DIMENSIONS, QUERIES)
    results: dict[str, float] = {}
    for index, storage, rows in (("flat", "f32", asked.rows), ("flat", "f32+i8", asked.rows)) + (
        (("hnsw", "f32+i8", asked.graph_rows),) if asked.graph_rows else ()
    ):
        places = np.random.default_rng(2).permutation(rows)
        db = database(vectors[:rows], places, storage=storage, index=index)
        filters: dict[str, Any] = {f"{share:.2%}": {"place": {"$lt": int(rows * share)}} for share in SHARES}
        for name, condition in {**filters, "50% by text": {"lang": "fr"}}.items():
            for word, again in (("again", True), ("new", False)):
                if again or "lang" not in condition:
                    key = f"{index} {storage}, {rows:,} rows, passing {name}, {word}"
                    results[key] = times(db, queries, condition, again)
            if index == "hnsw":
                results[f"{index} {storage}, {rows:,} rows, recall passing {name}"] = recall(db, queries, condition)
    for name, value in results.items():
        print(f"{name:60} {value:.3f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
