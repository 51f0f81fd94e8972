"""Changes appended to a saved file: little is written, nothing is lost, and damage is noticed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ConfigError, DatabaseFileError
from octavo.vdb import VectorDatabase, verify

D = 8


def saved(path: Path, index: str = "flat", rows: int = 40) -> VectorDatabase:
    db = VectorDatabase(D, index=index)  # type: ignore[arg-type]
    vectors = np.random.default_rng(0).standard_normal((rows, D), dtype=np.float32)
    db.add(vectors, ids=[str(i) for i in range(rows)])
    db.save(path)
    return db


def ids_of(path: Path) -> list[str | None]:
    with VectorDatabase.open(path) as db:
        return db.ids()


def test_a_row_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    db = VectorDatabase(256, storage="f32+i8")
    db.add(np.random.default_rng(0).standard_normal((20_000, 256), dtype=np.float32))
    db.save(path)
    size, file = path.stat().st_size, path.stat().st_ino
    db.add(np.ones(256, np.float32), ids="new", metadata={"year": 2021})
    db.remove(index=7)
    db.save()
    assert path.stat().st_ino == file
    assert 0 < path.stat().st_size - size < 4096
    size = path.stat().st_size
    db.save()
    assert path.stat().st_size == size
    for mode in ("read", "mmap"):
        with VectorDatabase.open(path, mode=mode) as again:  # type: ignore[arg-type]
            assert len(again) == 20_000
            assert again.get("new").metadata == {"year": 2021}
            assert again.info().read_only == (mode == "mmap")
    db.save(path)
    assert path.stat().st_ino != file


def changed_at_random(db: VectorDatabase, random: np.random.Generator, number: int) -> None:
    """A row more, replaced, removed or with other metadata."""
    ids = [name for name in db.ids() if name]
    what, some = random.integers(5), ids[int(random.integers(len(ids)))]
    vector = random.standard_normal(db.dimensions, dtype=np.float32)
    if what == 0:
        db.add(vector, ids=some, metadata={"number": number}, replace=True)
    elif what == 1:
        db.remove(some)
    elif what == 2:
        db.set_metadata({"number": number, "word": "w" * int(random.integers(40))}, id=some)
    else:
        count = int(random.integers(1, 12))
        names = [f"{number}-{i}" if i % 3 else None for i in range(count)]
        db.add(
            random.standard_normal((count, db.dimensions), dtype=np.float32),
            ids=names,
            metadata=[{"number": number}] * count,
        )


def assert_same(one: VectorDatabase, other: VectorDatabase, random: np.random.Generator) -> None:
    """Rows, ids, metadata, vectors and answers are the same, by every way to ask for them."""
    assert one.ids() == other.ids()
    assert one.indices().tolist() == other.indices().tolist()
    rows = one.indices().tolist()
    assert np.array_equal(np.asarray(one.vectors())[rows], np.asarray(other.vectors())[rows])
    for name in {name for name in one.ids() if name}:
        assert one.get(name) == other.get(name)
    assert "never" not in other
    queries = random.standard_normal((8, one.dimensions), dtype=np.float32)
    for settings in ({}, {"exact": True}, {"filter": {"number": {"$gte": 3}}}):
        a = one.search(queries, 5, with_metadata=True, **settings)  # type: ignore[call-overload]
        b = other.search(queries, 5, with_metadata=True, **settings)  # type: ignore[call-overload]
        assert [h.ids for h in a] == [h.ids for h in b]
        assert [h.metadata for h in a] == [h.metadata for h in b]
        assert a.distances.tolist() == b.distances.tolist()


@pytest.mark.parametrize("storage", ["f32", "f32+i8", "i8", "f16"])
@pytest.mark.parametrize("index", ["flat", "hnsw"])
@pytest.mark.parametrize("named", [True, False], ids=["with ids", "without"])
def test_a_mapped_file_shows_its_journal(tmp_path: Path, storage: str, index: str, named: bool, full: bool) -> None:
    path, other = tmp_path / "file.vdb", tmp_path / "other.vdb"
    for seed in range(30 if full else 1):
        random = np.random.default_rng(seed)
        rows = int(random.integers(200, 3000 if full else 900))
        vectors = random.standard_normal((rows, D), dtype=np.float32)
        db = VectorDatabase(D, storage=storage, index=index, links=4, threads=1)  # type: ignore[arg-type]
        db.add(vectors, ids=[str(i) for i in range(rows)] if named else None)
        db.save(path)
        if not named:
            db.add(np.eye(D, dtype=np.float32), ids=[f"first {i}" for i in range(D)])
        file, mapped = path.stat().st_ino, path.stat().st_size
        for number in range(12):
            changed_at_random(db, random, number)
            if number % 3:
                db.save()
        db.save()
        assert path.stat().st_ino == file
        assert path.stat().st_size > mapped
        with VectorDatabase.open(path, mode="mmap", threads=1) as view, VectorDatabase.open(path, threads=1) as read:
            assert_same(read, view, random)
            assert len(bytes(view)) > 0
            view.save(other)  # and what is saved from the view has no journal
            with VectorDatabase.open(other, threads=1) as again:
                assert_same(read, again, random)


def test_a_long_journal_is_folded(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    db = saved(path)
    file = path.stat().st_ino
    for i in range(40):
        db.add(np.ones((30, D), np.float32), ids=[f"{i}-{j}" for j in range(30)])
        db.save()
    assert path.stat().st_ino != file
    assert ids_of(path) == db.ids()


def test_what_cannot_be_appended_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    db = saved(path)
    file = path.stat().st_ino
    db.remove("3")
    db.compact()
    db.save()
    assert path.stat().st_ino != file
    assert ids_of(path) == db.ids()
    with pytest.raises(ConfigError, match="give save\\(\\) a path"):
        VectorDatabase(2).save()


def test_only_the_file_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "file.vdb"
    saved(path)
    mine, theirs = VectorDatabase.open(path), VectorDatabase.open(path)
    mine.remove("1")
    theirs.remove("2")
    theirs.save()
    with pytest.raises(DatabaseFileError, match="another program has changed it"):
        mine.save()
    with pytest.raises(DatabaseFileError, match="another program has changed it"):
        mine.save(path, mode="same")
    theirs.remove("5")
    theirs.save()
    assert "5" not in ids_of(path)


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_every_cut_and_every_flip(tmp_path: Path, index: str, full: bool) -> None:
    path, other = tmp_path / "file.vdb", tmp_path / "other.vdb"
    db = saved(path, index)
    states = [(path.stat().st_size, db.ids())]
    for i in range(2):
        db.add(np.full(D, i, np.float32), ids=f"new{i}")
        db.remove(str(i))
        db.save()
        states.append((path.stat().st_size, db.ids()))
    whole = path.read_bytes()
    step = 1 if full else 3 if index == "flat" else 19
    for size in [*range(states[0][0], len(whole), step), *range(len(whole) - 130, len(whole) + 1)]:
        other.write_bytes(whole[:size])
        assert ids_of(other) == max(state for state in states if state[0] <= size)[1]
    with VectorDatabase.open(other) as again:
        again.remove("9")
        again.save()
    other.write_bytes(whole[:-20])
    with VectorDatabase.open(other) as again:  # an unfinished save goes
        again.remove("9")
        again.save()
        assert ids_of(other) == again.ids()
    for place in [*range(states[0][0], len(whole), step), *range(len(whole) - 64, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        other.write_bytes(flipped)
        with pytest.raises(DatabaseFileError):
            verify(other)


WRITER = """
import sys
from octavo.vdb import VectorDatabase
db = VectorDatabase.open(sys.argv[1])
number = len(db)
while True:
    db.add([float(number)] * 8, ids=str(number))
    db.set_metadata({"last": number}, id=str(number))
    db.save()
    print(number, flush=True)
    number += 1
"""


def test_killed_at_any_moment(tmp_path: Path, full: bool) -> None:
    path = tmp_path / "file.vdb"
    saved(path)
    random = np.random.default_rng()
    for _ in range(300 if full else 5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(random.uniform(0, 0.05))
            writer.kill()
            last = int((first + writer.stdout.read()).split()[-1])
        with VectorDatabase.open(path) as db:
            assert len(db) in (last + 1, last + 2)
            assert db.ids() == [str(i) for i in range(len(db))]
            assert db.get(str(last)).metadata == {"last": last}
    for left in tmp_path.glob("*.tmp-*"):  # of whole files that were being written
        os.unlink(left)
