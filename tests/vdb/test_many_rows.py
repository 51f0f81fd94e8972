"""All rows within a radius, many rows at once, all rows as arrays, copies as bytes."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError, DatabaseFileError, DuplicateIdError, ReadOnlyDatabaseError, UnknownIdError
from octavo.vdb import VectorDatabase

RNG = np.random.default_rng(11)


def letters(**settings: Any) -> VectorDatabase:
    db = VectorDatabase(2, "euclidean", **settings)
    db.add([[i, 0] for i in range(6)], ids=list("abcdef"), metadata=[{"i": i} for i in range(6)])
    return db


@given(st.integers(0, 200), st.sampled_from(["cosine", "euclidean", "dot"]), st.floats(-3, 3), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_radius_gives_what_a_search_of_all_rows_gives(n: int, metric: Any, radius: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 7)).astype(np.float32)
    queries = rng.standard_normal((3, 7)).astype(np.float32)
    for storage in ("f32", "f32+i8", "i8"):
        db = VectorDatabase(7, metric, storage=storage)  # type: ignore[arg-type]
        db.add(vectors)
        for query, hits in zip(queries, db.search(queries, radius=radius), strict=True):
            everything = db.search(query, k=max(1, n))
            wanted = [(hit["index"], hit["distance"]) for hit in everything if hit["distance"] <= radius]
            assert [(hit["index"], hit["distance"]) for hit in hits] == wanted
            assert db.search(query, radius=radius) == hits
            assert list(db.search(query, k=2, radius=radius).indices) == [index for index, _ in wanted[:2]]


def test_a_radius_with_filters_graphs_and_limits() -> None:
    db = letters(index="hnsw")
    assert db.search([0, 0], radius=2).ids == ["a", "b", "c"]
    assert db.search([0, 0], k=2, radius=9).ids == ["a", "b"]
    assert db.search([0, 0], k=0, radius=9).ids == []
    assert db.search([0, 0], radius=4, filter={"i": {"$gte": 3}}).ids == ["d", "e"]
    assert db.search([0, 0], radius=4, filter=["b", "f"]).ids == ["b"]
    assert db.search([0, 0], radius=-1).ids == []
    assert db.search([0, 0], radius=float("inf")).ids == list("abcdef")
    assert db.search([0, 0], radius=np.nextafter(2.0, 0)).ids == ["a", "b"]
    hits = db.search([[0, 0], [9, 9]], radius=1, with_metadata=True)
    assert hits.counts == [2, 0]
    assert hits.metadata == [[{"i": 0}, {"i": 1}], []]
    for bad in (float("nan"), "near"):
        with pytest.raises(ConfigError, match="radius must be a number"):
            db.search([0, 0], radius=bad)  # type: ignore[arg-type]
    assert VectorDatabase(2).search([1, 0], radius=1).ids == []


def test_distances_and_indices_are_what_faiss_gives() -> None:
    db = letters()
    hits = db.search([[0, 0], [5, 0]], k=4, filter=[0, 1, 5])
    distances, indices = np.asarray(hits.distances), np.asarray(hits.indices)
    assert (distances.shape, distances.dtype, indices.dtype) == ((2, 4), np.float32, np.int64)
    assert indices.tolist() == [[0, 1, 5, -1], [5, 1, 0, -1]]
    assert distances.tolist() == [[0, 1, 5, np.inf], [0, 4, 5, np.inf]]


def test_many_rows_are_got_and_removed_at_once() -> None:
    db = letters()
    assert [row.id for row in db.get(["c", "a"])] == ["c", "a"]
    assert [row.id for row in db.get(index=[5, 0])] == ["f", "a"]
    with pytest.raises(UnknownIdError, match="'nobody'"):
        db.get(["a", "nobody"])
    with pytest.raises(UnknownIdError, match=r"id: no row has the id 'nobody'"):
        db.remove(["a", "nobody"])
    with pytest.raises(UnknownIdError, match="index 77"):
        db.remove(index=[0, 77])
    assert len(db) == 6, "nothing was removed"
    assert db.remove(["a", "b"]) == 2
    with pytest.raises(UnknownIdError, match="no row has the index 0"):
        db.remove(index=[2, 0])
    assert db.remove(index=np.array([2, 3])) == 2  # type: ignore[arg-type]
    assert db.ids() == ["e", "f"]
    assert db.remove([]) == 0


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_rows_are_removed_by_filter(index: Any) -> None:
    db = VectorDatabase(4, index=index)
    vectors = RNG.standard_normal((500, 4)).astype(np.float32)
    db.add(vectors, metadata=[{"i": i} for i in range(500)])
    assert db.remove(filter={"i": {"$lt": 400}}) == 400
    assert db.remove(filter={"i": {"$lt": 400}}) == 0
    assert sorted(db.search(vectors[0], k=500).indices) == list(range(400, 500)) == list(db.indices())
    assert db.remove(filter=lambda index: index % 2) == 50
    assert db.remove(filter={}) == 50
    assert len(db) == 0
    with pytest.raises(ConfigError, match="one of the three"):
        db.remove()
    with pytest.raises(ConfigError, match="one of the three"):
        db.remove("a", filter={})


def test_ids_may_be_ints() -> None:
    db = VectorDatabase(1, "euclidean")
    db.add([[0], [1], [2]], ids=np.array([7, -3, 2**62]))  # type: ignore[arg-type]
    db.add([3], ids=0)
    assert db.ids() == ["7", "-3", str(2**62), "0"]
    assert (db.find(-3), db.find("-3"), 7 in db, 8 in db) == (1, 1, True, False)
    assert db.get(np.int64(7)).index == 0  # type: ignore[call-overload]
    db.set_metadata({"a": 1}, id=7)
    assert db.remove(7) == 1
    with pytest.raises(DuplicateIdError, match="'-3' is in the database already"):
        db.add([4], ids=[-3])
    with pytest.raises(DuplicateIdError, match="'5' is given twice"):
        db.add([[4], [5]], ids=[5, "5"])
    for bad in (1.5, True, 2**63, b"x"):
        with pytest.raises(ConfigError, match="an id is text"):
            db.add([4], ids=[bad])  # type: ignore[list-item]


def test_rows_ids_and_vectors_are_walked() -> None:
    db = letters()
    db.remove("b")
    assert [(row.index, row.id, row.metadata) for row in db][:2] == [(0, "a", {"i": 0}), (2, "c", {"i": 2})]
    assert list(db.indices()) == [0, 2, 3, 4, 5]
    assert db.ids() == ["a", "c", "d", "e", "f"]
    assert np.asarray(db.vectors())[db.indices()].tolist() == [[i, 0] for i in (0, 2, 3, 4, 5)]
    seen = []
    for row in db:
        seen.append(row.id)
        if row.id == "c":
            db.remove("d")
    assert seen == ["a", "c", "e", "f"]
    empty = VectorDatabase(3)
    assert (list(empty), empty.ids(), list(empty.indices()), list(empty.vectors())) == ([], [], [], [])


@pytest.mark.parametrize("storage", ["f32", "f32+i8", "f16", "i8"])
def test_vectors_of_a_mapped_file_are_not_copied(storage: Any, tmp_path: Path) -> None:
    path, vectors = tmp_path / "x.vdb", RNG.standard_normal((1000, 8)).astype(np.float32)
    db = VectorDatabase(8, storage=storage)
    db.add(vectors)
    db.save(path)
    stored = [db.get(index=i).vector.tolist() for i in range(1000)]
    view = VectorDatabase.open(path, mode="mmap")
    lent = np.asarray(view.vectors())
    assert lent.tolist() == stored
    assert not lent.flags.writeable
    if storage.startswith("f32"):
        again = np.asarray(view.vectors())
        assert lent.__array_interface__["data"] == again.__array_interface__["data"], "the same memory"
        with pytest.raises(BufferError):
            memoryview(db)
    view.close()
    del view
    gc.collect()
    assert lent.tolist() == stored, "the file stays open for those who look at it"


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_bytes_and_pickle(index: Any, tmp_path: Path) -> None:
    db = letters(index=index, storage="f32+i8")
    db.remove("c")
    db.save(tmp_path / "x.vdb")
    assert bytes(db) == (tmp_path / "x.vdb").read_bytes()
    mapped = VectorDatabase.open(tmp_path / "x.vdb", mode="mmap")
    for other in (
        VectorDatabase.from_bytes(bytes(db)),
        VectorDatabase.from_bytes(memoryview(bytes(mapped))),
        pickle.loads(pickle.dumps(db)),
        pickle.loads(pickle.dumps(mapped)),
        copy.deepcopy(db),
    ):
        assert list(other) == list(db)
        assert other.search([3, 0], k=5) == db.search([3, 0], k=5)
        other.add([9, 9], ids="new")
        assert "new" not in db
    with pytest.raises(ReadOnlyDatabaseError):
        mapped.remove(filter={})

    class Own(VectorDatabase):
        pass

    assert type(Own.from_bytes(bytes(db))) is Own


@pytest.mark.parametrize("bad", [b"", b"x" * 5000, bytes(VectorDatabase(2))[:-1]])
def test_bytes_that_are_no_database(bad: bytes) -> None:
    with pytest.raises(DatabaseFileError, match="no database, or damaged"):
        VectorDatabase.from_bytes(bad)
