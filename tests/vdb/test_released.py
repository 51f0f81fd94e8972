"""Files of every version, kept in tests/vdb/files, open as they did: SQLite's promise.

`1-*` is in the first format, that of vdb.h 0.1, put together after its specification; `2-*` and `3-*` were made by
c/make_released.c with the vdb.h of their time. A new version adds its files, and none is ever made again.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from octavo.errors import VectorDatabaseError
from octavo.vdb import VectorDatabase, verify

FILES = sorted((Path(__file__).parent / "files").iterdir())
ROWS, DIMENSIONS = 40, 5
MODES: tuple[Literal["read", "mmap"], ...] = ("read", "mmap")


def vector(i: int) -> list[float]:
    return [((i * 7 + j * j * 3) % 11 - 5) / 4 for j in range(DIMENSIONS)]


def metadata(i: int, version: int) -> Any:
    if version >= 2 and i % 4 == 1:
        return f"m{i}".encode()
    if version >= 3 and i % 4 == 2:
        return {"i": i, "half": i / 2, "name": f"m{i}", "even": i % 2 == 0, "none": None}
    return None


def kept(version: int) -> list[int]:
    return [i for i in range(ROWS) if version == 1 or i % 5 != 4]


def test_there_are_files_of_every_version() -> None:
    assert [sum(path.name.startswith(f"{version}-") for path in FILES) for version in (1, 2, 3)] == [1, 5, 5]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", MODES)
def test_a_file_opens_as_it_was_written(path: Path, mode: Literal["read", "mmap"], tmp_path: Path) -> None:
    version, storage, index = int(path.name[0]), path.stem.split("-")[1].replace("_", "+"), path.stem.split("-")[2]
    verify(path)
    if version == 1 and mode == "mmap":
        with pytest.raises(VectorDatabaseError, match="cannot open"):
            VectorDatabase.open(path, mode=mode)
        return
    db = VectorDatabase.open(path, mode=mode)
    facts = db.info()
    assert (facts.storage, facts.index, facts.metric, facts.dimensions) == (storage, index, 1, DIMENSIONS)
    rows = list(db)
    assert [row.index for row in rows] == kept(version)
    assert [row.id for row in rows] == [f"row {i}" if i % 3 else None for i in kept(version)]
    assert [row.metadata for row in rows] == [metadata(i, version) for i in kept(version)]
    for row in rows:
        assert row.vector.tolist() == pytest.approx(vector(row.index), abs=0.01 if storage == "i8" else 0)
        assert row.id is None or db.find(row.id) == row.index
    query = np.array([0.3, -0.2, 0.1, 0.7, -0.9])
    stored = np.array([row.vector for row in rows], np.float64)
    wanted = np.sort(np.linalg.norm(stored - query.astype(np.float32), axis=1))
    for exact in (False, True):
        assert np.asarray(db.search(query, k=40, exact=exact).distances) == pytest.approx(wanted, rel=1e-6)
    if version == 3:
        assert sorted(db.search(query, k=40, filter={"half": {"$gte": 9}}).indices) == [18, 22, 26, 30, 38]
    if version >= 2:
        db.save(tmp_path / "again.vdb")
        assert (tmp_path / "again.vdb").read_bytes() == path.read_bytes(), "one database has one right file"
    assert VectorDatabase.from_bytes(path.read_bytes()).ids() == db.ids()
