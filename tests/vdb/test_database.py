"""What a user can do with a database, and every error with what it says."""

import math
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import (
    ConfigError,
    DatabaseClosedError,
    DatabaseFileError,
    DuplicateIdError,
    OctavoError,
    ReadOnlyDatabaseError,
    UnknownIdError,
    VectorDatabaseError,
    VectorError,
)
from octavo.vdb import Hits, HitsBatch, VDBError, VDBMetric, VectorDatabase, kernels, set_kernels, verify

ROWS = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
IDS = ["x", "y", "z", "xy"]


def filled(**settings: object) -> VectorDatabase:
    db = VectorDatabase(3, metric="euclidean", **settings)  # type: ignore[arg-type]
    assert db.add(ROWS, ids=IDS, metadata=[b"mx", None, b"", b"m\0xy"]) == [0, 1, 2, 3]
    return db


def test_one_vector_and_many() -> None:
    db = VectorDatabase(2)
    assert db.add([1, 0]) == 0
    assert db.add([0, 1], ids="one", metadata=b"data") == 1
    assert db.add([[1, 1]], ids=["row"]) == [2]
    assert db.add([[2, 1], [1, 2]]) == [3, 4]
    assert db.add([]) == []
    assert len(db) == db.count() == 5
    assert db.get("one").metadata == b"data"


def test_answer_to_one_query() -> None:
    hits = filled().search([1, 0, 0], k=3)
    assert isinstance(hits, Hits)
    assert hits.indices.tolist() == [0, 3, 1]
    assert hits.distances.tolist() == pytest.approx([0, 1, math.sqrt(2)])
    assert (hits.indices.format, hits.distances.format) == ("q", "f")
    assert hits.ids == ["x", "xy", "y"]
    assert hits.counts == [3]
    assert hits[0] == {"index": 0, "distance": 0.0, "id": "x"}
    assert [hit["id"] for hit in hits] == ["x", "xy", "y"]
    assert hits[-1]["id"] == "y"
    assert hits[1:] == [hits[1], hits[2]]
    assert hits == list(hits)
    assert hits != []
    assert repr(hits).startswith("Hits([{'index': 0")
    with pytest.raises(IndexError):
        hits[3]
    with pytest.raises(TypeError):
        hash(hits)


def test_answer_to_a_batch() -> None:
    db = filled()
    hits = db.search([[1, 0, 0], [0, 0, 2]], k=3, with_metadata=True)
    assert isinstance(hits, HitsBatch)
    assert isinstance(hits[0], Hits)
    assert np.asarray(hits.indices).shape == np.asarray(hits.distances).shape == (2, 3)
    assert np.asarray(hits.indices).dtype == np.int64
    assert len(hits) == 2
    assert hits.ids == [["x", "xy", "y"], ["z", "x", "y"]]
    assert hits.metadata == [[b"mx", b"m\0xy", None], [None, b"mx", None]]
    assert hits[1] == [*db.search([0, 0, 2], k=3, with_metadata=True)]
    assert hits[1][0] == {"index": 2, "distance": 1.0, "id": "z", "metadata": None}
    assert hits[1].indices.tolist() == hits.indices.tolist()[1]
    assert repr(hits) == "<Hits of 2 queries, k=3>"
    none = db.search(np.zeros((0, 3), np.float32), k=4)
    assert len(none) == 0
    assert np.asarray(none.distances).shape == (0, 4)
    assert none.ids == none.counts == []


def test_missing_hits_are_marked() -> None:
    hits = filled().search([[1, 0, 0], [0, 1, 0]], k=3, filter=["x", "y"])
    assert hits.indices.tolist() == [[0, 1, -1], [1, 0, -1]]
    assert np.isinf(np.asarray(hits.distances)[:, 2]).all()
    assert hits.counts == [2, 2]
    assert hits.ids == [["x", "y"], ["y", "x"]]


def test_an_empty_database_answers_with_nothing() -> None:
    db = VectorDatabase(2)
    assert db.search([1, 0]) == []
    assert db.search([1, 0]).distances.tolist() == []
    assert db.search([[1, 0], [0, 1]]).counts == [0, 0]


def test_arrays_outlive_hits_and_database() -> None:
    with filled() as db:
        distances = np.asarray(db.search([[1, 0, 0], [0, 1, 0]], k=2)[1].distances)
    assert distances.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        distances[0] = 1


def test_metadata_must_be_asked_for() -> None:
    hits = filled().search([1, 0, 0])
    with pytest.raises(ConfigError, match="with_metadata=True"):
        hits.metadata  # noqa: B018


def test_get_find_and_contains() -> None:
    db = filled()
    row = db.get("xy")
    assert (row.index, row.vector.tolist(), row.id, row.metadata) == (3, [1, 1, 0], "xy", b"m\0xy")
    assert db.get(index=2) == db.get("z")
    assert db.get(index=1).metadata is None
    assert db.find("y") == 1
    assert "y" in db
    assert "nobody" not in db
    assert "" not in db
    with pytest.raises(UnknownIdError, match="no row has the id 'nobody'"):
        db.find("nobody")
    with pytest.raises(UnknownIdError, match="index 4"):
        db.get(index=4)
    with pytest.raises(UnknownIdError, match="index -1"):
        db.get(index=-1)
    with pytest.raises(ConfigError, match="an id or an index"):
        db.get()
    with pytest.raises(ConfigError, match="not both"):
        db.get(id="x", index=0)


def test_remove_keeps_other_indices_and_compact_renumbers() -> None:
    db = filled()
    assert db.remove("y") == 1
    assert db.remove(index=0) == 1
    assert db.search([0, 1, 0], k=9).indices.tolist() == [3, 2]
    assert db.info().slots == 4
    db.compact()
    assert db.search([0, 1, 0], k=9).indices.tolist() == [1, 0]
    assert db.info().slots == 2
    for wrong in ({"id": "y"}, {"index": 7}, {"index": 2**70}):
        with pytest.raises((UnknownIdError, ConfigError)):
            db.remove(**wrong)  # type: ignore[arg-type]
    assert db.count() == 2


def test_equal_ids_are_removed_and_filtered_together() -> None:
    db = filled()
    db.add_vector([5, 5, 5], "x")
    db.add_vector([6, 6, 6], "x")
    assert db.find("x") == 0
    assert db.search([5, 5, 5], k=9, filter=["x"]).indices.tolist() == [4, 5, 0]
    assert db.remove("x") == 3
    assert "x" not in db


def test_replace() -> None:
    db = filled()
    index = db.add([9, 9, 9], ids="y", replace=True)
    assert db.find("y") == index
    assert db.get("y").vector.tolist() == [9, 9, 9]
    assert db.get("y").metadata is None
    assert db.count() == 4


@pytest.mark.parametrize("ids", [["new", "x"], ["new", "new"]])
def test_duplicate_ids_are_refused_whole(ids: list[str]) -> None:
    db = filled()
    with pytest.raises(DuplicateIdError, match=f"'{ids[1]}'.*nothing was added"):
        db.add([[1, 2, 3], [4, 5, 6]], ids=ids)
    assert (db.count(), "new" in db) == (4, False)
    with pytest.raises(DuplicateIdError, match="'x' is given twice"):
        db.add([[1, 2, 3], [4, 5, 6]], ids=["x", "x"], replace=True)


def test_ids_and_metadata_that_cannot_be() -> None:
    db = filled()
    wrong: list[tuple[object, object, str]] = [
        (["a"], None, "1 ids for 2 vectors"),
        ("a", None, "ids must be a list"),
        (["a", 7.5], None, r"ids\[1\] is 7.5"),
        (["a", "b\0c"], None, "NUL"),
        (["a", "\ud800"], None, "surrogate"),
        (["a", "b" * (2**20 + 1)], None, "1048577 bytes"),
        (None, b"one", "metadata must be a list"),
        (None, [b"one"], "1 metadata for 2 vectors"),
        (None, [b"one", "two"], r"metadata\[1\].*a dict of str"),
        (3, None, "ids must be a list"),
    ]
    for ids, metadata, message in wrong:
        with pytest.raises(ConfigError, match=message):
            db.add([[1, 2, 3], [4, 5, 6]], ids=ids, metadata=metadata)  # type: ignore[arg-type]
    assert db.count() == 4
    assert db.add([[1, 2, 3], [4, 5, 6]], ids=["", None], metadata=[bytearray(b"m"), None]) == [4, 5]
    assert db.get(index=4).id is None
    assert db.get(index=4).metadata == b"m"


def test_unicode_and_longest_ids() -> None:
    db = VectorDatabase(1)
    ids = ["é", "日本語", "🙂", "b" * 2**20]
    db.add([[1]] * 4, ids=ids)
    assert sorted(db.search([1]).ids) == sorted(ids)


def test_settings_that_cannot_be() -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"dimensions": 0}, "dimensions must be from 1 to 65536, not 0"),
        ({"dimensions": 65537}, "dimensions"),
        ({"dimensions": "3"}, "dimensions must be an int"),
        ({"metric": "cos"}, 'metric \'cos\' is unknown; choose one of "cosine", "euclidean", "dot"'),
        ({"metric": 3}, "metric 3"),
        ({"storage": "f64"}, "storage 'f64'"),
        ({"index": "ivf"}, "index 'ivf'"),
        ({"links": 1}, "links must be from 2 to 128"),
        ({"build_effort": 0}, "build_effort"),
        ({"threads": 0}, "threads"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            VectorDatabase(**{"dimensions": 3, **settings})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dimension"):
        VectorDatabase()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("metric", "number"), [("cosine", 0), ("euclidean", 1), ("dot", 2), (VDBMetric.DOT_PRODUCT, 2)]
)
def test_metrics(metric: str, number: int) -> None:
    assert VectorDatabase(2, metric=metric).metric is VDBMetric(number)  # type: ignore[arg-type]


def test_searches_that_cannot_be() -> None:
    db = filled()
    assert db.search([1, 0, 0], k=0) == []
    for k in (-1, 1.5, "5", None):
        if k is not None:
            with pytest.raises(ConfigError, match="k must be"):
                db.search([1, 0, 0], k=k)  # type: ignore[arg-type]
    assert len(db.search([1, 0, 0], k=2**62)) == 4
    with pytest.raises(ConfigError, match="effort"):
        db.search([1, 0, 0], effort=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kk'"):
        db.search([1, 0, 0], kk=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="multiple values for argument 'k'"):
        db.search([1, 0, 0], 3, k=3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="needs the argument 'query'"):
        db.search(k=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_filters(index: str) -> None:
    db = filled(index=index)
    keep = [0, 2]
    filters: list[object] = [
        ["x", "z"],
        {"x", "z"},
        (i for i in ("x", "z")),
        keep,
        np.array(keep),
        np.array(keep, np.int32),
        np.array(keep, np.uint16),
        ["x", 2],
        np.array(["x", "z"]),
        np.array([True, False, True, False]),
        bytes([0b0101]),
        bytearray([0b0101]),
        np.packbits([True, False, True, False], bitorder="little"),
        lambda i: i in keep,
    ]
    for which in filters:
        assert db.search([1, 1, 0], k=9, filter=which).indices.tolist() == keep  # type: ignore[arg-type]
    assert len(db.search([1, 1, 0], filter=[])) == len(db.search([1, 1, 0], filter=b"")) == 0


def test_filters_that_cannot_be() -> None:
    db = filled()
    unknown: list[tuple[object, str]] = [
        (["x", "nobody"], "filter: no row has the id 'nobody'"),
        ([4], "filter: index 4; indices of this database are from 0 to 3"),
        ([-1], "index -1"),
        (np.array([0, -1]), "index -1"),
    ]
    for which, message in unknown:
        with pytest.raises(UnknownIdError, match=message):
            db.search([1, 0, 0], filter=which)  # type: ignore[arg-type]
    wrong: list[tuple[object, str]] = [
        ("x", "one id as a list"),
        ([True, False], "is a bool"),
        ([1.5], "neither an id"),
        (np.array([True, False]), "2 bools, but one for each of the 4 indices"),
        (np.ones((2, 2), np.int64), "one dimension"),
        (3, "filter is 3"),
        (np.array([1.5]), "neither an id"),
        ({"a": [1]}, "values are str"),
        (np.array([0, 2], np.uint8), r'2 uint8 is no bitset of the 4 indices.*x\.astype\("int64"\)'),
        (np.array([16], np.uint8), "no bit past the last index"),
        (np.zeros(0, np.uint8), "0 uint8 is no bitset"),
    ]
    for which, message in wrong:
        with pytest.raises(ConfigError, match=message):
            db.search([1, 0, 0], filter=which)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        db.search([1, 0, 0], filter=lambda i: 1 // 0)


def test_a_function_is_asked_about_rows_only_and_may_use_the_database() -> None:
    db = filled()
    db.remove("y")
    asked = []

    def with_data(index: int) -> bool:
        asked.append(index)
        return db.get(index=index).metadata is not None

    assert db.search([0, 1, 0], filter=with_data).indices.tolist() == [3, 0]
    assert asked == [0, 2, 3]


def test_vectors_that_are_not_finite() -> None:
    db = filled()
    for value, name in ((math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1e39, "inf")):
        with pytest.raises(VectorError, match=rf"query\[1\] is {name}"):
            db.search([0, value, 0])
        with pytest.raises(VectorError, match=rf"vectors\[1\]\[2\] is {name}"):
            db.add([[0, 0, 0], [1, 1, value]])
    assert db.count() == 4
    with pytest.raises(VectorError, match="65504 for f16"):
        VectorDatabase(1, storage="f16").add([1e5])


def test_a_closed_database() -> None:
    db = filled()
    db.close()
    db.close()
    assert db.closed
    assert db.dimensions == 3
    assert repr(db) == "<VectorDatabase, closed>"
    for call in (
        lambda: db.search([1, 0, 0]),
        lambda: db.add([1, 0, 0]),
        lambda: db.add_vector([1, 0, 0]),
        lambda: db.remove("x"),
        lambda: db.remove_vector(0),
        lambda: db.save("nowhere"),
        lambda: len(db),
        lambda: "x" in db,
        db.count,
        db.compact,
        db.info,
        db.__enter__,
    ):
        with pytest.raises(DatabaseClosedError, match="closed"):
            call()


def test_uninitialised_and_twice_initialised() -> None:
    with pytest.raises(DatabaseClosedError):
        VectorDatabase.__new__(VectorDatabase).search([])
    db = filled()
    with pytest.raises(VectorDatabaseError, match="made already"):
        db.__init__(3)  # type: ignore[misc]
    assert db.count() == 4


@pytest.mark.parametrize("storage", ["f32", "f16", "bf16", "i8", "f32+i8"])
@pytest.mark.parametrize("index", ["flat", "hnsw"])
@pytest.mark.parametrize("mode", ["read", "mmap"])
def test_saved_is_opened(tmp_path: Path, storage: str, index: str, mode: str) -> None:
    path = tmp_path / "é.vdb"
    db = filled(storage=storage, index=index, links=8, build_effort=50)
    db.remove("y")
    db.save(path)
    verify(path)
    with VectorDatabase.open(path, mode=mode, threads=1) as again:  # type: ignore[arg-type]
        assert type(again) is VectorDatabase
        assert again.search([1, 0.5, 0], with_metadata=True) == db.search([1, 0.5, 0], with_metadata=True)
        assert again.get("xy") == db.get("xy")
        facts = again.info()
        assert (facts.metric, facts.storage, facts.index, facts.links) == (VDBMetric.EUCLIDEAN, storage, index, 8)
        assert (facts.count, facts.read_only, facts.has_ids, facts.threads) == (3, mode == "mmap", True, 1)
        if mode == "mmap":
            for change in (lambda: again.add([1, 1, 1]), lambda: again.remove("x"), again.compact):
                with pytest.raises(ReadOnlyDatabaseError, match='mode="read"'):
                    change()
            assert again.count() == 3
        else:
            assert again.add([1, 1, 1], ids="new") is not None


def test_files_that_cannot_be(tmp_path: Path) -> None:
    db = filled()
    path = tmp_path / "a.vdb"
    with pytest.raises(DatabaseFileError, match="No such file"):
        VectorDatabase.open(path)
    with pytest.raises(DatabaseFileError, match=r"verify.*No such file"):
        verify(path)
    with pytest.raises(DatabaseFileError, match="cannot write"):
        db.save(tmp_path / "missing" / "a.vdb")
    path.write_bytes(b"this is no database at all" * 400)
    with pytest.raises(DatabaseFileError, match=r"a\.vdb"):
        VectorDatabase.open(path)
    db.save(path)
    whole = path.read_bytes()
    for place in (0, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place])
        for mode in ("read", "mmap"):
            with pytest.raises(DatabaseFileError):
                VectorDatabase.open(path, mode=mode)  # type: ignore[arg-type]
        with pytest.raises(DatabaseFileError):
            verify(path)
    path.write_bytes(whole[:4096] + bytes([whole[4096] ^ 1]) + whole[4097:])
    with pytest.raises(DatabaseFileError, match="vectors"):
        VectorDatabase.open(path)
    with pytest.raises(ConfigError, match="mode"):
        VectorDatabase.open(path, mode="write")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        VectorDatabase.open(3)  # type: ignore[arg-type]


def test_reserve_and_threads() -> None:
    db = VectorDatabase(3, threads=2)
    db.reserve(1000)
    db.set_threads(1)
    assert db.info().threads == 1
    db.set_threads()
    assert db.info().threads == 0
    assert VectorDatabase(3, multithreaded=False).info().threads == 1
    with pytest.raises(ConfigError, match="rows"):
        db.reserve(-1)


def test_every_kernel_gives_the_same_answer() -> None:
    best = kernels()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 37), dtype=np.float32)
    answers = []
    try:
        for name in ("plain", "avx2", "avx512", "amx", "neon"):
            try:
                set_kernels(name)
            except ConfigError:
                continue
            db = VectorDatabase(37, storage="f32+i8")
            db.add(vectors)
            hits = db.search(vectors[:9], k=7)
            answers.append((hits.indices.tolist(), hits.distances.tolist()))
    finally:
        set_kernels(None)
    assert kernels() == best
    assert answers
    assert all(answer == answers[0] for answer in answers)
    with pytest.raises(ConfigError, match="no kernels 'mmx'"):
        set_kernels("mmx")


def test_subclasses() -> None:
    class Named(VectorDatabase):
        def __init__(self, name: str) -> None:
            super().__init__(2)
            self.name = name

    db = Named("mine")
    db.add([1, 0])
    assert (db.name, db.count(), type(db.search([1, 0]))) == ("mine", 1, Hits)


def test_errors_are_octavo_errors() -> None:
    assert issubclass(VectorDatabaseError, OctavoError)
    assert issubclass(VectorDatabaseError, RuntimeError)
    assert issubclass(VectorError, ValueError)
    assert issubclass(UnknownIdError, KeyError)
    assert str(UnknownIdError("plain text")) == "plain text"
    assert (VDBError.OK, VDBError.THREAD_FAILURE, VDBError.FULL) == (0, -6, -13)
