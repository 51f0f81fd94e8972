"""Any sequence of calls leaves a database that answers as a plain list of rows would.

Vectors hold small integers, whose distances are exact in double precision but for the last root or quotient: equal
distances are equal here and there, and an exact search must name the very same rows.
"""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.errors import DuplicateIdError, ReadOnlyDatabaseError, UnknownIdError
from octavo.vdb import VectorDatabase, verify

D = 5
Vector = list[int]
VECTORS = st.lists(st.integers(-4, 4), min_size=D, max_size=D)
IDS = st.sampled_from([None, *"abcdefgh"])
METADATA = st.sampled_from([None, b"one", b"\0two\0"])
ROWS = st.lists(st.tuples(VECTORS, IDS, METADATA), min_size=1, max_size=6)
METRICS = {"cosine": 0, "euclidean": 1, "dot": 2}


def distance(metric: str, q: Vector, x: Vector) -> float:
    dot = sum(a * b for a, b in zip(q, x, strict=True))
    if metric == "dot":
        return -float(dot)
    if metric == "euclidean":
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(q, x, strict=True)))
    squares = sum(a * a for a in q) * sum(b * b for b in x)
    return 1 - dot / math.sqrt(squares) if squares else 1.0


def before_table(db: VectorDatabase) -> bytes:
    """The sections of its file, without the last."""
    whole = bytes(db)
    return whole[4096 : int.from_bytes(whole[80 + 12 * 24 + 8 : 80 + 12 * 24 + 16], "little")]


class Machine(RuleBasedStateMachine):
    storage: ClassVar[Any] = "f32"
    index: ClassVar[Any] = "flat"

    @initialize(metric=st.sampled_from(sorted(METRICS)))
    def begin(self, metric: Any) -> None:
        self.metric = metric
        self.folder = Path(tempfile.mkdtemp())
        self.db = VectorDatabase(D, metric=metric, storage=self.storage, index=self.index, links=4, threads=2)
        self.rows: dict[int, tuple[Vector, str | None, bytes | None]] = {}
        self.mapped = False

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.db.close()
            shutil.rmtree(self.folder)

    def with_id(self, name: str | None) -> list[int]:
        return [i for i, row in self.rows.items() if name and row[1] == name]

    def renumber(self) -> None:
        self.rows = {i: self.rows[old] for i, old in enumerate(sorted(self.rows))}

    @precondition(lambda self: not self.mapped)
    @rule(rows=ROWS, replace=st.booleans())
    def add(self, rows: list[tuple[Vector, str | None, bytes | None]], replace: bool) -> None:
        vectors, ids, metadata = map(list, zip(*rows, strict=True))
        named = [name for name in ids if name]
        if len(set(named)) < len(named) or (not replace and any(map(self.with_id, named))):
            with pytest.raises(DuplicateIdError):
                self.db.add(vectors, ids, metadata, replace)
            return
        indices = self.db.add(vectors, ids, metadata, replace)
        assert not self.rows.keys() & set(indices), "an index is used twice"
        for old in [i for name in named for i in self.with_id(name)]:
            del self.rows[old]
        self.rows |= dict(zip(indices, rows, strict=True))

    @precondition(lambda self: not self.mapped)
    @rule(vector=VECTORS, name=IDS)
    def add_vector(self, vector: Vector, name: str | None) -> None:
        self.db.add_vector(vector, name)
        new = [i for i in range(self.db.info().slots) if i not in self.rows and self.present(i)]
        assert len(new) == 1
        self.rows[new[0]] = (vector, name, None)

    def present(self, index: int) -> bool:
        try:
            self.db.get(index=index)
        except UnknownIdError:
            return False
        return True

    @precondition(lambda self: not self.mapped)
    @rule(name=IDS.filter(bool))
    def remove_id(self, name: str) -> None:
        gone = self.with_id(name)
        if not gone:
            with pytest.raises(UnknownIdError):
                self.db.remove(name)
            return
        assert self.db.remove(name) == len(gone)
        for i in gone:
            del self.rows[i]

    @precondition(lambda self: self.rows and not self.mapped)
    @rule(data=st.data())
    def remove_index(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.rows)))
        assert self.db.remove(index=index) == 1
        del self.rows[index]

    @precondition(lambda self: self.rows and not self.mapped)
    @rule(data=st.data())
    def remove_vector(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.rows)))
        self.db.remove_vector(index)
        self.rows = {i - (i > index): row for i, row in self.rows.items() if i != index}

    @precondition(lambda self: not self.mapped)
    @rule()
    def compact(self) -> None:
        self.db.compact()
        self.renumber()
        assert self.db.info().slots == len(self.rows)

    @rule(mode=st.sampled_from(["read", "mmap"]))
    def save_and_open(self, mode: Any) -> None:
        path = self.folder / "rows.vdb"
        self.db.save(path)
        self.db.close()
        self.db = VectorDatabase.open(path, mode=mode, threads=2)
        self.mapped = mode == "mmap"
        if self.mapped:
            with pytest.raises(ReadOnlyDatabaseError):
                self.db.add([0] * D)

    @rule(mode=st.sampled_from(["read", "mmap"]))
    def save_changes_and_open(self, mode: Any) -> None:
        """Appended to the file, and then the same as what is written whole, but for the order of the table of ids."""
        path = self.folder / "rows.vdb"
        if self.db._file is None:
            self.db.save(path)
        self.db.save()
        whole = before_table(self.db)
        self.db.close()
        self.db = VectorDatabase.open(path, mode=mode, threads=2)
        verify(path)
        assert before_table(self.db) == whole
        self.mapped = mode == "mmap"

    @rule(queries=st.lists(VECTORS, min_size=1, max_size=9), k=st.integers(1, 12), exact=st.booleans())
    def search(self, queries: list[Vector], k: int, exact: bool) -> None:
        hits = self.db.search(queries, k, exact=exact)
        for i, query in enumerate(queries):
            self.check(query, k, exact, hits[i])
        self.check(queries[0], k, exact, self.db.search(queries[0], k, exact=exact))

    @precondition(lambda self: self.rows)
    @rule(query=VECTORS, k=st.integers(1, 12), data=st.data())
    def search_filtered(self, query: Vector, k: int, data: st.DataObject) -> None:
        kept = data.draw(st.sets(st.sampled_from(sorted(self.rows))))
        self.check(query, k, False, self.db.search(query, k, filter=kept), kept)
        names = {row[1] for row in self.rows.values() if row[1]}
        kept = {i for name in names for i in self.with_id(name)}
        self.check(query, k, True, self.db.search(query, k, filter=names, exact=True), kept)

    def check(self, query: Vector, k: int, exact: bool, hits: Any, kept: set[int] | None = None) -> None:
        true = sorted(
            (distance(self.metric, query, row[0]), i) for i, row in self.rows.items() if kept is None or i in kept
        )
        distances, indices = hits.distances.tolist(), hits.indices.tolist()
        assert len(set(indices)) == len(indices) == min(k, len(true))
        assert distances == sorted(distances)
        for i, found in zip(indices, distances, strict=True):
            assert found == pytest.approx(distance(self.metric, query, self.rows[i][0]), rel=1e-6, abs=1e-7)
        # A graph of so few rows is searched whole; of equal distances it may name others.
        assert distances == pytest.approx([d for d, _ in true[:k]], rel=1e-6, abs=1e-7)
        if (exact or self.index == "flat") and self.metric != "cosine":
            assert indices == [i for _, i in true[:k]]
        assert hits.ids == [self.rows[i][1] for i in indices]

    @invariant()
    def holds_the_rows(self) -> None:
        if not hasattr(self, "db"):
            return
        assert self.db.count() == len(self.rows)
        for i, (vector, name, metadata) in self.rows.items():
            row = self.db.get(index=i)
            assert (row.index, row.vector.tolist(), row.id, row.metadata) == (i, vector, name, metadata)
            if name:
                assert self.db.find(name) == min(self.with_id(name))


def case(storage: Any, index: Any) -> Any:
    machine = type(f"{storage}-{index}", (Machine,), {"storage": storage, "index": index})
    test = machine.TestCase
    test.settings = settings(
        max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return test


TestFlat = case("f32", "flat")
TestCodes = case("f32+i8", "flat")
TestGraph = case("f32", "hnsw")
TestGraphCodes = case("f32+i8", "hnsw")
