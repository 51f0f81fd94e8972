"""Programs written for the first version's Python class run as before."""

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
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


def test_remove_vector_moves_later_rows_by_one_beside_removed_ones() -> None:
    for index in ("flat", "hnsw"):
        db = VectorDatabase(1, VDBMetric.EUCLIDEAN, index=index)  # type: ignore[arg-type]
        for i in range(9):
            db.add_vector([i], str(i))
        db.remove("2")
        db.remove("6")
        db.remove_vector(4)
        places = {int(r["id"]): r["index"] for r in db.search([0], 9)}
        assert places == {0: 0, 1: 1, 3: 3, 5: 4, 7: 6, 8: 7}
        assert db.find("8") == 7
        assert db.info().slots == 8
        assert [db.add([10 + i], ids=f"new {i}") for i in range(3)][-1] <= 10
        assert db.count() == 9
        assert db.get("7").vector.tolist() == [7]


def test_results_are_a_list_of_the_caller() -> None:
    db = VectorDatabase(2, VDBMetric.EUCLIDEAN)
    for name, x in (("far", 5), ("near", 1), ("middle", 3)):
        db.add_vector([x, 0], name)
    plain = [
        {"index": 1, "distance": 1.0, "id": "near"},
        {"index": 2, "distance": 3.0, "id": "middle"},
        {"index": 0, "distance": 5.0, "id": "far"},
    ]

    def results() -> list[dict[str, Any]]:
        return db.search([0, 0])

    assert isinstance(results(), list)
    assert json.loads(json.dumps(results())) == json.loads(json.dumps(results(), indent=1)) == plain
    assert json.loads(json.dumps({"results": results()})) == {"results": plain}
    assert results() + results() == plain + plain
    assert [0] + results() == [0, *plain]  # noqa: RUF005
    assert results() * 2 == 2 * results() == plain * 2
    assert plain == results()
    assert list(results()) == [*results()] == plain
    assert sorted(results(), key=lambda r: r["index"])[0] == plain[2]
    assert results().copy() == copy.copy(results()) == copy.deepcopy(results()) == plain
    assert pickle.loads(pickle.dumps(results())) == plain
    assert plain[1] in results()
    assert results().index(plain[1]) == results().count(plain[1]) == 1
    assert list(reversed(results())) == plain[::-1]
    first, *others = results()
    assert [first, *others] == plain
    changed = results()
    changed.sort(key=lambda r: -r["distance"])
    assert changed == plain[::-1]
    changed[0] = {"other": 1}
    changed[1]["note"] = "mine"
    del changed[2]
    changed.append({"more": 2})
    changed += [3]
    changed.insert(0, 4)
    assert changed == [4, {"other": 1}, {**plain[1], "note": "mine"}, {"more": 2}, 3]
    assert changed.pop() == 3
    changed.clear()
    assert changed == []
    longer = [0]
    longer.extend(results())
    longer[0:1] = results()
    assert longer == plain + plain
    assert results() == plain


def test_what_numbers_and_names_were_allowed() -> None:
    db = VectorDatabase(2)
    db.name = "mine"  # type: ignore[attr-defined]
    assert db.name == "mine"  # type: ignore[attr-defined]
    db.add_vector(np.array([1.0, 2.0]), "float64")
    db.add_vector(np.array([1, 2]), "ints")
    db.add_vector(np.arange(4, dtype=np.float32)[::2], "strided")
    assert db.search(np.array([1.0, 2.0]), k=1)[0]["id"] == "float64"
    assert db.search([1, 2], k=0) == []
    assert isinstance(db.search([1, 2], k=0), list)
    assert db.search([1, 2], k=100)[0]["id"] == "float64"


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
