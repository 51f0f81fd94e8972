"""A database larger than memory should be: `python -m octavo.bench.vdb.large FILE [--rows N] [--index hnsw]`.

Makes FILE, if it is not there, with the vectors on disk while it is made (`keep_on_disk`), and searches it mapped in
another process, so that what each holds can be told: vectors on disk, codes in memory. Times one query at a time, first
after the system was told to forget the file ("cold"), then with the file in the page cache, as far as memory holds it.
Ten million rows of 256 numbers need 23 GB of disk while they are made, and 13 GB afterwards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from octavo.vdb import VectorDatabase

CHUNK, K, CENTRES = 50_000, 10, 1000


def clouds(count: int, dimensions: int, seed: int) -> Any:
    """Gaussian clouds around centres that are the same for every seed, float32 [count, dimensions]."""
    centres = np.random.default_rng(7).standard_normal((CENTRES, dimensions), np.float32)
    draw = np.random.default_rng([7, seed])
    return centres[draw.integers(0, CENTRES, count)] + 0.5 * draw.standard_normal((count, dimensions), np.float32)


def peak() -> int:
    """The most bytes that this process has held: VmHWM counts pages of mapped files, too."""
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def make(path: Path, rows: int, dimensions: int, index: Any, resident: int) -> dict[str, float]:
    """Makes the file, and says what that took."""
    began = time.perf_counter()
    db = VectorDatabase(dimensions, storage="f32+i8", index=index)
    db.keep_on_disk(path.parent)
    db.limit_resident(resident // 8)
    adding = 0.0
    for first in range(0, rows, CHUNK):
        vectors = clouds(min(CHUNK, rows - first), dimensions, first)
        started = time.perf_counter()
        db.add(vectors)
        adding += time.perf_counter() - started
    made = time.perf_counter()
    db.save(path)
    return {
        "make, s": made - began,
        "of it add, s": adding,
        "save, s": time.perf_counter() - made,
        "peak, GB": peak() / 1e9,
    }


def cached(path: Path) -> float:
    """The share of a file that is in the page cache, by the time that a few hundred reads of it take."""
    size, fast, count = path.stat().st_size, 0, 400
    with open(path, "rb", buffering=0) as file:
        for place in np.random.default_rng(1).integers(0, size - 8, count):
            began = time.perf_counter_ns()
            os.pread(file.fileno(), 8, int(place))
            fast += time.perf_counter_ns() - began < 20_000
    return fast / count


def read_through(path: Path) -> None:
    """Reads a file from its beginning to its end, so that the page cache has what it has room for."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def ask(path: Path, resident: int, queries: int, threads: int, exact: bool) -> dict[str, float]:
    """Searches the file, mapped, and says how long queries take and what is held."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    db = VectorDatabase.open(path, mode="mmap", threads=threads, resident=resident)
    opened = time.perf_counter() - began
    seconds, worked = [], []
    asked = clouds(queries + 1, db.dimensions, 1 << 40)
    for i, query in enumerate(asked):
        began, before = time.perf_counter(), time.process_time()
        db.search(query, K, exact=exact)
        seconds.append(time.perf_counter() - began)
        worked.append(time.process_time() - before)
        if i == 0:
            read_through(path)
    return {
        "open, ms": 1e3 * opened,
        "first query, cold, s": seconds[0],
        "query, median, s": statistics.median(seconds[1:]),
        "query, slowest, s": max(seconds[1:]),
        "of it on each core, s": statistics.median(worked[1:]) / threads,
        "in the page cache": cached(path),
        "peak, GB": peak() / 1e9,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("file", type=Path)
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--dimensions", type=int, default=256)
    options.add_argument("--index", choices=("flat", "hnsw"), default="flat")
    options.add_argument("--resident", type=int, default=3_400_000_000, help="bytes of the mapped file that may stay")
    options.add_argument("--queries", type=int, default=20)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--part", choices=("make", "ask"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.part == "make":
        print(json.dumps(make(asked.file, asked.rows, asked.dimensions, asked.index, asked.resident)))
        return
    if asked.part == "ask":
        print(json.dumps(ask(asked.file, asked.resident, asked.queries, asked.threads, asked.index == "flat")))
        return
    results: dict[str, Any] = {}
    for part in ["make", "ask"] if not asked.file.exists() else ["ask"]:
        command = [sys.executable, "-m", "octavo.bench.vdb.large", *sys.argv[1:], "--part", part]
        results[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for name, value in results[part].items():
            print(f"{part:5} {name:24} {value:10.3f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
