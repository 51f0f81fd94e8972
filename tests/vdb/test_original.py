"""Programs written for the first version's Python class run as before."""

import struct
from pathlib import Path

import pytest

from octavo.vdb import VDBError, VDBMetric, VectorDatabase


def test_a_program_of_the_first_version(tmp_path: Path) -> None:
    path = str(tmp_path / "first.vdb")
    with VectorDatabase(3, metric=VDBMetric.EUCLIDEAN, multithreaded=True) as db:
        assert db.dimensions == 3
        assert db.metric == VDBMetric.EUCLIDEAN == 1
        assert db.add_vector([1.0, 0.0, 0.0], "a") is None  # type: ignore[func-returns-value]
        db.add_vector([0.0, 1.0, 0.0], vector_id="b")
        db.add_vector((0.0, 0.0, 2.0))
        assert db.count() == 3
        results = db.search([0.9, 0.0, 0.0], k=2)
        assert len(results) == 2
        assert results[0]["index"] == 0
        assert results[0]["id"] == "a"
        assert results[0]["distance"] == pytest.approx(0.1)
        assert isinstance(results[0]["distance"], float)
        db.save(path)
    with pytest.raises(RuntimeError):
        db.count()
    again = VectorDatabase.load(path)
    assert again.count() == 3
    assert again.search([0.0, 0.0, 2.0])[0] == {"index": 2, "distance": 0.0, "id": None}


def test_positional_arguments_and_defaults() -> None:
    db = VectorDatabase(2, 2, False)
    assert db.metric is VDBMetric.DOT_PRODUCT
    for i in range(7):
        db.add_vector([i, 1], f"v{i}")
    results = db.search([1, 0])
    assert [r["id"] for r in results] == ["v6", "v5", "v4", "v3", "v2"]
    assert [r["distance"] for r in results] == [-6, -5, -4, -3, -2]
    assert VectorDatabase(2).metric is VDBMetric.COSINE


def test_equal_and_empty_ids_are_allowed() -> None:
    db = VectorDatabase(1, VDBMetric.EUCLIDEAN)
    for i in range(3):
        db.add_vector([i], "same")
    db.add_vector([3], "")
    assert [r["id"] for r in db.search([0])] == ["same", "same", "same", None]


def test_later_indices_shift_after_remove_vector() -> None:
    db = VectorDatabase(1, VDBMetric.EUCLIDEAN)
    for i in range(5):
        db.add_vector([i], str(i))
    db.remove_vector(1)
    assert [(r["index"], r["id"]) for r in db.search([0], 9)] == [(0, "0"), (1, "2"), (2, "3"), (3, "4")]
    with pytest.raises(RuntimeError):
        db.remove_vector(4)


def test_errors() -> None:
    db = VectorDatabase(3)
    assert db.search([1, 2, 3]) == []
    with pytest.raises(ValueError, match="2 numbers, but this database has 3 dimensions"):
        db.add_vector([1, 2])
    with pytest.raises(ValueError, match="4 numbers"):
        db.search([1, 2, 3, 4])
    with pytest.raises(ValueError, match="takes one vector"):
        db.add_vector([[1, 2, 3]])  # type: ignore[list-item]
    with pytest.raises(RuntimeError):
        VectorDatabase.load("/nowhere/at/all")
    assert VDBError.NOT_FOUND == -4


def test_files_of_the_first_version(tmp_path: Path) -> None:
    rows = [([1.0, 0.0], b"a"), ([0.0, 1.0], b""), ([1.0, 1.0], "é".encode())]
    data = struct.pack("<IQQi", 0x56444230, 2, len(rows), 1)
    for vector, name in rows:
        data += struct.pack("<2fI", *vector, len(name)) + name
    path = tmp_path / "v1.vdb"
    path.write_bytes(data)
    db = VectorDatabase.load(str(path))
    assert db.metric is VDBMetric.EUCLIDEAN
    assert [(r["index"], r["id"]) for r in db.search([1, 0])] == [(0, "a"), (2, "é"), (1, None)]
