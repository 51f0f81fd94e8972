"""Metadata as a dict, and searches that filter by it, against a model in Python. In C: tests/vdb/c/test_values.c."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError, ReadOnlyDatabaseError, UnknownIdError
from octavo.vdb import VectorDatabase

Metadata = dict[str, Any]

INTS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3) | st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1])
FLOATS = st.floats(allow_nan=False) | st.sampled_from([0.0, 1.0, 1.5, 2.0**53, 2.0**63, -(2.0**63)])
VALUES = INTS | FLOATS | st.text(max_size=3) | st.booleans() | st.none() | st.sampled_from(["x" * 300, "é"])
KEYS = st.sampled_from(["year", "lang", "score"])
ROWS = st.lists(st.dictionaries(KEYS, VALUES), min_size=1, max_size=30)
COMPARISONS = (
    st.builds(lambda op, value: {op: value}, st.sampled_from(["$eq", "$ne"]), VALUES)
    | st.builds(lambda op, values: {op: values}, st.sampled_from(["$in", "$nin"]), st.lists(VALUES, max_size=4))
    | st.builds(lambda op, value: {op: value}, st.sampled_from(["$lt", "$lte", "$gt", "$gte"]), INTS | FLOATS)
)
CONDITIONS = st.recursive(
    st.dictionaries(KEYS, COMPARISONS | VALUES, max_size=2),
    lambda parts: st.builds(
        lambda op, joined: {op: joined}, st.sampled_from(["$and", "$or"]), st.lists(parts, min_size=1, max_size=3)
    ),
    max_leaves=6,
)
MISSING = object()


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def equal(a: object, b: object) -> bool:
    return a == b and (isinstance(a, bool) == isinstance(b, bool))


def compares(found: Any, operator: str, operand: Any) -> bool:
    if operator in ("$in", "$eq", "$nin", "$ne"):
        operands = operand if operator in ("$in", "$nin") else [operand]
        return any(equal(found, each) for each in operands) == (operator in ("$in", "$eq"))
    if not is_number(found):
        return False
    return {"$lt": found < operand, "$lte": found <= operand, "$gt": found > operand, "$gte": found >= operand}[
        operator
    ]


def passes(row: Metadata, condition: Metadata) -> bool:
    for key, wanted in condition.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(passes(row, part) for part in wanted):
                return False
        elif isinstance(wanted, dict):
            if not all(compares(row.get(key, MISSING), *item) for item in wanted.items()):
                return False
        elif not compares(row.get(key, MISSING), "$eq", wanted):
            return False
    return True


def database(rows: list[Metadata], **settings: Any) -> VectorDatabase:
    db = VectorDatabase(2, "euclidean", **settings)
    db.add([[i, 1] for i in range(len(rows))], ids=[str(i) for i in range(len(rows))], metadata=rows)
    return db


def found(db: VectorDatabase, condition: Metadata, **options: Any) -> list[int]:
    return sorted(db.search([0, 0], k=10_000, filter=condition, **options).indices)


@given(ROWS, st.lists(CONDITIONS, min_size=1, max_size=4), ROWS)
@settings(max_examples=150, deadline=None)
def test_filters_pass_what_python_says(
    rows: list[Metadata], conditions: list[Metadata], others: list[Metadata]
) -> None:
    db = database(rows)
    for condition in conditions:
        assert found(db, condition) == [i for i, row in enumerate(rows) if passes(row, condition)]
    for i, metadata in enumerate(others[: len(rows)]):  # columns are there, and must learn of it
        db.set_metadata(metadata, id=str(i))
        rows[i] = metadata
    db.remove("0")
    for condition in conditions:
        assert found(db, condition) == [i for i, row in enumerate(rows) if i and passes(row, condition)]


@given(ROWS)
@settings(max_examples=50, deadline=None)
def test_dicts_come_back_as_they_were(rows: list[Metadata]) -> None:
    db = database(rows)
    for i, row in enumerate(rows):
        back = db.get(index=i).metadata
        assert back == (row or None)
        assert [type(v) for v in (back or {}).values()] == [type(v) for v in row.values()]
        assert list(back or {}) == list(row)
    hits = db.search([0, 0], k=len(rows), with_metadata=True)
    assert hits.metadata == [row or None for row in rows]
    assert [hit["metadata"] for hit in hits] == hits.metadata


def test_the_example_of_the_manual() -> None:
    db = VectorDatabase(2)
    rows = [{"year": 2019, "lang": "fr"}, {"year": 2021, "lang": "ru"}, {"year": 2022.5, "lang": "en"}, {"year": 2023}]
    db.add([[1, i] for i in range(4)], metadata=rows)
    assert found(db, {"year": {"$gte": 2020}, "lang": {"$in": ["fr", "ru"]}}) == [1]
    assert found(db, {"year": {"$gt": 2019, "$lt": 2023}}) == [1, 2]
    assert found(db, {"$or": [{"lang": "fr"}, {"year": {"$gte": 2023}}]}) == [0, 3]
    assert found(db, {"lang": {"$ne": "fr"}}) == [1, 2, 3]
    assert found(db, {}) == [0, 1, 2, 3]
    assert found(db, {"no such key": 1}) == []


def test_bytes_dicts_and_nothing_side_by_side(tmp_path: Path) -> None:
    db = VectorDatabase(2)
    db.add([[1, 0], [2, 0], [3, 0]], metadata=[b"raw", {"a": 1}, None])
    db.add([4, 0], metadata={"a": np.int32(2), "b": np.float32(0.5)})
    assert [db.get(index=i).metadata for i in range(4)] == [b"raw", {"a": 1}, None, {"a": 2, "b": 0.5}]
    assert found(db, {"a": {"$gte": 1}}) == [1, 3]
    path = tmp_path / "x.vdb"
    db.save(path)
    assert path.read_bytes()[8] == 3
    for mode in ("read", "mmap"):
        again = VectorDatabase.open(path, mode=mode)  # type: ignore[arg-type]
        assert [again.get(index=i).metadata for i in range(4)] == [b"raw", {"a": 1}, None, {"a": 2, "b": 0.5}]
        assert found(again, {"a": {"$gte": 1}}) == [1, 3]
    with pytest.raises(ReadOnlyDatabaseError):
        again.set_metadata(b"other", index=0)
    for i in (1, 3):
        db.set_metadata(b"bytes", index=i)
    db.save(path)
    assert path.read_bytes()[8] == 2, "a file without values is what older versions read"
    with pytest.raises(UnknownIdError):
        db.set_metadata({}, index=9)
    with pytest.raises(UnknownIdError):
        db.set_metadata({}, id="nobody")


def test_metadata_changes_without_the_vector() -> None:
    db = database([{"a": i} for i in range(5)], index="hnsw")
    before = db.search([2, 1], k=5)
    db.set_metadata({"a": 100}, id="3")
    db.set_metadata(None, index=0)
    assert db.get("3").metadata == {"a": 100}
    assert db.get("0").metadata is None
    assert db.search([2, 1], k=5) == before
    assert found(db, {"a": {"$gt": 2}}) == [3, 4]
    db.compact()
    db.remove_vector(1)
    assert found(db, {"a": {"$gt": 2}}) == [2, 3]


@pytest.mark.parametrize("bad", [math.nan, 2**63, [1], {"b": 1}, b"bytes", object(), "\ud800"])
def test_what_is_no_value_is_refused(bad: object) -> None:
    db = VectorDatabase(2)
    with pytest.raises(ConfigError, match=r'metadata\[0\]\["a"\]'):
        db.add([1, 0], metadata={"a": bad})  # type: ignore[dict-item]
    assert len(db) == 0
    if not isinstance(bad, dict):
        with pytest.raises(ConfigError, match=r'filter\["a"\]'):
            db.search([1, 0], filter={"a": bad})


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b", 7])
def test_what_is_no_key_is_refused(key: object) -> None:
    db = VectorDatabase(2)
    with pytest.raises(ConfigError, match="key"):
        db.add([1, 0], metadata={key: 1})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="key"):
        db.search([1, 0], filter={key: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": {"$near": 1}}, "no \\$near"),
        ({"$not": {"a": 1}}, "\\$not is no key"),
        ({"a": {}}, "no other keys"),
        ({"a": {"$gt": "x"}}, "compares numbers"),
        ({"a": {"$lt": True}}, "compares numbers"),
        ({"$and": []}, "at least one"),
        ({"$or": {"a": 1}}, "takes a list"),
        ({"$and": ["a"]}, "joins dicts"),
        ({"a": {"$in": "abc"}}, "takes a list"),
    ],
)
def test_wrong_conditions_say_what_is_right(bad: Metadata, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VectorDatabase(2).search([1, 0], filter=bad)


def test_conditions_nested_too_deep_are_refused() -> None:
    condition: Metadata = {"a": 1}
    for _ in range(100):
        condition = {"$and": [condition, condition]}
    with pytest.raises(ConfigError, match="30 deep"):
        VectorDatabase(2).search([1, 0], filter=condition)


def test_a_graph_filters_as_a_scan_does() -> None:
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((4000, 16)).astype(np.float32)
    db = VectorDatabase(16, index="hnsw")
    db.add(vectors, metadata=[{"i": i} for i in range(4000)])
    for limit in (2000, 40):
        condition = {"i": {"$lt": limit}}
        quick = db.search(vectors[:50], k=10, filter=condition)
        exact = db.search(vectors[:50], k=10, filter=condition, exact=True)
        assert all(index < limit for index in quick.indices.cast("b").cast("q"))
        shared = sum(len(set(a.indices) & set(b.indices)) for a, b in zip(quick, exact, strict=True))
        assert shared >= 0.95 * 500


def test_threads_filter_while_one_writes() -> None:
    db = VectorDatabase(2, "euclidean")
    db.add([[i, 0] for i in range(2000)], metadata=[{"even": i % 2 == 0, "i": i} for i in range(2000)])
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for hit in db.search([0, 0], k=50, filter={"even": True, "i": {"$gte": 5}}, with_metadata=True):
                if not hit["metadata"]["even"] or hit["metadata"]["i"] < 5:
                    wrong.append(hit)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(600):
        db.set_metadata({"even": i % 3 == 0, "i": i}, index=i)
        db.add([i, 1], metadata={"even": i % 2 == 0, "i": i})
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert found(db, {"even": True, "i": {"$lt": 4}}) == [0, 3, 2000, 2002]


@pytest.mark.parametrize(
    "condition",
    [
        {"year": {"$gte": 2010}},
        {"lang": {"$ne": "fr"}},
        {"$or": [{"year": {"$lt": 2005}}, {"lang": {"$in": ["ru", "x" * 300]}}]},
        {"score": {"$lte": 0.5}, "year": {"$nin": [2000, 2001.0]}},
        {"year": {"$lt": 2001}},
    ],
)
def test_a_graph_asks_the_rows_it_meets(condition: Metadata) -> None:
    draw = np.random.default_rng(3)
    vectors = draw.standard_normal((4000, 8), np.float32)
    langs = ["fr", "ru", "x" * 300]
    rows: list[Metadata] = [{"year": 2000 + i % 20, "lang": langs[i % 3], "score": (i % 7) / 7} for i in range(4000)]
    for row in rows[::11]:
        del row["lang"]
    db = VectorDatabase(8, "euclidean", index="hnsw", threads=1)
    db.add(vectors, metadata=rows)
    db.remove(filter={"year": 2019})
    passing = {i for i, row in enumerate(rows) if row["year"] != 2019 and passes(row, condition)}
    queries = draw.standard_normal((20, 8), np.float32)
    near = [set(hits.indices) for hits in db.search(queries, k=10, filter=condition)]
    exact = [set(hits.indices) for hits in db.search(queries, k=10, filter=condition, exact=True)]
    assert all(hits <= passing and len(hits) == 10 for hits in near + exact)
    assert sum(len(a & b) for a, b in zip(near, exact, strict=True)) >= 0.95 * 200


@pytest.mark.parametrize("storage", ["f32", "f32+i8", "f16", "i8"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot"])
def test_few_that_pass_are_searched_as_all_are(storage: Any, metric: Any) -> None:
    """The answer is what passes of the answer without a filter, though rows few and far between are gathered."""
    random = np.random.default_rng(5)
    vectors = random.standard_normal((9000, 72), dtype=np.float32)
    vectors[::97] *= 1e-20
    vectors[5] = 0
    queries = [*random.standard_normal((2, 72), dtype=np.float32), np.full(72, 1e25, np.float32)]
    for threads in (1, 2):
        db = VectorDatabase(72, metric, storage=storage, threads=threads)
        db.add(vectors, metadata=[{"n": n} for n in range(len(vectors))])
        db.remove(index=list(range(0, 9000, 50)))
        everything = [db.search(query, 9000) for query in queries]
        for count in (1, 3, 40, 64, 700, 1300):
            passing = {int(n) for n in random.choice(9000, count, replace=False)}
            for query, rows in zip(queries, everything, strict=True):
                right = [i for i in rows.indices if i in passing][:10]
                assert db.search(query, 10, filter={"n": {"$in": sorted(passing)}}).indices.tolist() == right


@pytest.mark.parametrize("kind", [int, float], ids=["ints", "floats"])
def test_columns_that_are_asked_often_are_sorted(kind: Any) -> None:
    """The same rows pass before a column is sorted by value, after it, and after rows have changed."""
    random = np.random.default_rng(6)
    rows = 3000
    values: list[Any] = [kind(n) for n in random.integers(-40, 40, rows) * 10]
    values[:4] = [kind(-(2**62)), kind(2**62), kind(0), -0.0 if kind is float else 0]
    db = VectorDatabase(2, threads=1)
    db.add(
        random.standard_normal((rows, 2), dtype=np.float32),
        metadata=[{"n": v, "m": i % 3} for i, v in enumerate(values)],
    )
    held: dict[int, Any] = dict(enumerate(values))
    for round in range(60):
        low, high = sorted(kind(n) for n in random.integers(-42, 42, 2) * 10)
        high = low if round % 3 == 0 else high
        wanted: list[tuple[dict[str, Any], list[int]]] = [
            ({"n": {"$gte": low, "$lte": high}}, [i for i in held if low <= held[i] <= high]),
            ({"n": {"$gt": low}}, [i for i in held if held[i] > low]),
            ({"n": high}, [i for i in held if held[i] == high]),
            ({"n": high, "m": {"$ne": round % 4}}, [i for i in held if held[i] == high and i % 3 != round % 4]),
            ({"$or": [{"n": low}, {"m": 2}]}, [i for i in held if held[i] == low or i % 3 == 2]),
        ]
        for asked, right in wanted:
            assert sorted(db.search([1, 0], rows, filter=asked).indices.tolist()) == right, asked
        if round % 20 == 19:
            gone = sorted(held)[round]
            db.remove(index=gone)
            del held[gone]
            changed = sorted(held)[2 * round]
            db.set_metadata({"n": kind(7), "m": changed % 3}, index=changed)
            held[changed] = kind(7)


def test_a_sorted_column_with_conditions_that_chunks_decide() -> None:
    """Of some chunks of 1024 rows all pass the other conditions, of some none, of some a part."""
    random = np.random.default_rng(7)
    numbers = random.permutation(5000)
    held: list[Metadata] = [{"n": int(n), "c": i // 1024} for i, n in enumerate(numbers)]
    for i, row in enumerate(held):
        row |= {"m": 1} if i % 3 or row["c"] == 1 else {}
    db = VectorDatabase(2, threads=1)
    db.add(random.standard_normal((5000, 2), dtype=np.float32), metadata=held)
    for condition, passes in (
        ({"c": {"$ne": 1}}, lambda row: row["c"] != 1),
        ({"c": {"$in": [0, 4]}, "m": {"$ne": 2}}, lambda row: row["c"] in (0, 4)),
        ({"m": 1}, lambda row: "m" in row),
        ({"m": {"$ne": 1}}, lambda row: "m" not in row),
        ({"$or": [{"c": 2}, {"m": {"$nin": [1]}}]}, lambda row: row["c"] == 2 or "m" not in row),
    ):
        found = db.search([1, 0], 5000, filter={"n": {"$lt": 150}} | condition).indices
        assert sorted(found.tolist()) == [i for i, row in enumerate(held) if row["n"] < 150 and passes(row)], condition
