"""Vectors that lie on disk: the same rows and answers as in memory, and no more of them resident than was asked for."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.errors import ConfigError, DatabaseFileError
from octavo.vdb import VectorDatabase

STORAGES = ["f32", "f32+i8", "f16", "i8"]


def rows(count: int, dimensions: int, seed: int = 0) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.random.default_rng(seed).standard_normal((count, dimensions), dtype=np.float32)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_the_same_as_in_memory(tmp_path: Path, storage: str, index: str) -> None:
    settings: dict[str, Any] = {"storage": storage, "index": index, "build_effort": 40, "threads": 2}
    here, there = VectorDatabase(200, **settings), VectorDatabase(200, **settings)
    there.keep_on_disk(tmp_path)
    there.limit_resident(2_000_000 if storage == "f32+i8" else 200_000_000)
    for start in range(0, 1500, 500):
        for db in (here, there):
            db.add(rows(500, 200, start), ids=[str(i) for i in range(start, start + 500)])
            db.remove([str(i) for i in range(start, start + 100)])
    for db in (here, there):
        db.compact()
        db.add(rows(300, 200, 7))
    queries = rows(20, 200, 8)
    for exact in (False, True):
        assert (
            here.search(queries, 5, exact=exact).indices.tolist()
            == there.search(queries, 5, exact=exact).indices.tolist()
        )
    assert bytes(here) == bytes(there)
    assert os.listdir(tmp_path) == []  # the file has no name
    here.save(tmp_path / "file.vdb")
    for resident in (10_000_000, 10**9):
        with VectorDatabase.open(tmp_path / "file.vdb", mode="mmap", resident=resident) as view:
            assert bytes(view) == bytes(here)
            assert view.search(queries, 5).indices.tolist() == here.search(queries, 5).indices.tolist()


def test_what_a_journal_changed_is_not_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    db = VectorDatabase(256, storage="f32+i8", threads=1)
    db.add(rows(8000, 256), ids=[str(i) for i in range(8000)])
    db.save(path)
    for i in range(0, 8000, 1900):
        db.add(np.full(256, i + 1.0, np.float32), ids=str(i), replace=True)
    db.save()
    assert path.stat().st_size > 8000 * 256 * 5 + 5 * 256 * 5
    for resident in (1, 3_000_000):
        with VectorDatabase.open(path, mode="mmap", threads=1, resident=resident) as view:
            for query in rows(10, 256, 1):
                assert view.search(query, 10).ids == db.search(query, 10).ids
            for i in range(0, 8000, 1900):
                assert view.get(str(i)).vector.tolist() == [i + 1.0] * 256


MEASURE = """
import sys
import numpy as np
from octavo.vdb import VectorDatabase
def resident():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024
kind, path = sys.argv[1:]
random = np.random.default_rng(0)
db = VectorDatabase(512, storage="f32+i8", threads=1)
before = resident()
if kind == "made":
    db.keep_on_disk(path)
    db.limit_resident(4_000_000)
    most = 0
    for _ in range(30):
        db.add(random.standard_normal((1000, 512), dtype=np.float32))
        most = max(most, resident())
else:
    db = VectorDatabase.open(path, mode="mmap", threads=1, resident=16_000_000 + 6_000_000)
    most = 0
    for query in random.standard_normal((100, 512), dtype=np.float32):
        db.search(query, 100)
        most = max(most, resident())
print(most - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_is_resident_than_was_asked_for(tmp_path: Path) -> None:
    def measured(kind: str, path: Path) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, kind, str(path)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    vectors, codes = 30_000 * 512 * 4, 30_000 * (512 + 12)  # 61 MB and 16 MB
    assert measured("made", tmp_path) < codes + 4_000_000 + 14_000_000 < vectors
    db = VectorDatabase(512, storage="f32+i8")
    for _ in range(30):
        db.add(rows(1000, 512))
    db.save(tmp_path / "file.vdb")
    assert measured("mapped", tmp_path / "file.vdb") < codes + 6_000_000 < vectors


def test_mistakes(tmp_path: Path) -> None:
    db = VectorDatabase(4)
    with pytest.raises(ConfigError, match="nothing of this database lies on disk"):
        db.limit_resident(1000)
    with pytest.raises(DatabaseFileError, match="No such file"):
        db.keep_on_disk(tmp_path / "none")
    db.add([1, 0, 0, 0])
    with pytest.raises(ConfigError, match="before the first row"):
        db.keep_on_disk(tmp_path)
    db = VectorDatabase(4)
    db.keep_on_disk(tmp_path)
    with pytest.raises(ConfigError, match="before the first row"):
        db.keep_on_disk(tmp_path)
    with pytest.raises(ConfigError, match="bytes"):
        db.limit_resident(0)
    db.save(tmp_path / "file.vdb")
    with pytest.raises(ConfigError, match="mmap"):
        VectorDatabase.open(tmp_path / "file.vdb", resident=1000)
