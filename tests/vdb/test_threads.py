"""Threads share a database: readers beside a writer, close() beside searches, fork()."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.errors import DatabaseClosedError, UnknownIdError
from octavo.vdb import VectorDatabase

D = 16
SECONDS = 1.0


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D), dtype=np.float32)


def together(*works: Callable[[], None]) -> None:
    """Runs all in threads; raises what any of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_searches_beside_a_writer(index: Any, tmp_path: Path) -> None:
    db = VectorDatabase(D, metric="euclidean", index=index, threads=2)
    fixed = vectors(50)
    db.add(fixed, ids=[f"fixed{i}" for i in range(50)], metadata=[b"%d" % i for i in range(50)])
    done = threading.Event()

    def write() -> None:
        rng, until = np.random.default_rng(1), time.monotonic() + SECONDS
        turn = 0
        while time.monotonic() < until:
            ids = [f"row{i}" for i in rng.choice(100, 20, replace=False)]
            db.add(rng.standard_normal((20, D), dtype=np.float32) + 40, ids=ids, replace=True)
            for name in ids[::2]:
                db.remove(name)
            if turn % 5 == 0:
                db.compact()
            if turn % 7 == 0:
                db.save(tmp_path / "rows.vdb")
            turn += 1
        done.set()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set():
            at = rng.integers(0, 50, 3)
            hits = db.search(fixed[at], k=4, with_metadata=True)
            assert [names[0] for names in hits.ids] == [f"fixed{i}" for i in at]
            assert [data[0] for data in hits.metadata] == [b"%d" % i for i in at]
            assert np.asarray(hits.distances)[:, 0].tolist() == [0, 0, 0]
            assert db.search(fixed[at[0]], k=2, filter=[f"fixed{at[0]}"]).ids[:1] == [f"fixed{at[0]}"]
            assert "fixed7" in db
            with suppress(UnknownIdError):
                assert db.get(f"row{at[0]}").id == f"row{at[0]}"
            with suppress(UnknownIdError):
                assert db.search(fixed[0], filter=[f"row{at[1]}"]).ids == [f"row{at[1]}"]

    together(write, lambda: read(1), lambda: read(2))
    with VectorDatabase.open(tmp_path / "rows.vdb") as saved:
        assert saved.search(fixed, k=1).ids == [[f"fixed{i}"] for i in range(50)]


def test_an_answer_has_ids_as_soon_as_there_are_any() -> None:
    for _ in range(100):
        db = VectorDatabase(D)
        db.add(vectors(1) * -1)
        seen: list[list[str | None]] = []
        together(
            lambda db=db: db.add(vectors(1), ids=["first"]),
            lambda db=db, s=seen: s.append(db.search(vectors(1)[0], 1).ids),
        )
        assert seen in ([["first"]], [[None]])
        assert db.search(vectors(1)[0], 1).ids == ["first"]


def test_close_beside_searches() -> None:
    queries = vectors(200, seed=3)
    for turn in range(20):
        db = VectorDatabase(D, index="hnsw" if turn % 2 else "flat", threads=2)
        db.add(vectors(2000 if turn % 2 == 0 else 200))
        inside = threading.Barrier(4)

        def read(db: VectorDatabase = db, inside: threading.Barrier = inside) -> None:
            inside.wait()
            with suppress(DatabaseClosedError):
                while True:
                    assert len(db.search(queries, k=3)) == 200

        def close(db: VectorDatabase = db, inside: threading.Barrier = inside, turn: int = turn) -> None:
            inside.wait()
            time.sleep(0.001 * turn)
            db.close()
            assert db.closed

        together(read, read, read, close)


def test_other_threads_run_during_a_long_search() -> None:
    db = VectorDatabase(64, threads=1)
    db.add(np.random.default_rng(0).standard_normal((20000, 64), dtype=np.float32))
    queries = np.random.default_rng(1).standard_normal((2000, 64), dtype=np.float32)
    turns = 0
    done = threading.Event()

    def search() -> None:
        db.search(queries)
        done.set()

    def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.0005)

    together(search, count)
    assert turns > 5


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_ends_a_long_build(threads: int) -> None:
    db = VectorDatabase(64, index="hnsw", threads=threads)
    rows = np.random.default_rng(0).standard_normal((30000, 64), dtype=np.float32)
    db.add(rows[:2000], ids=[str(i) for i in range(2000)])
    before = db.search(rows[:50], k=5)

    def stop(*_: object) -> None:
        raise Interrupted

    earlier = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        begin = time.monotonic()
        with pytest.raises(Interrupted):
            db.add(rows, ids=[f"new {i}" for i in range(30000)])
        took = time.monotonic() - begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert took < 3  # of some ten seconds; 0.55 where nobody else works
    assert (db.count(), "new 0" in db) == (2000, False)
    assert db.search(rows[:50], k=5) == before
    db.add(rows[2000:2500], ids=[f"new {i}" for i in range(500)])
    assert db.search(rows[2000:2500], k=1).ids == [[f"new {i}"] for i in range(500)]


def test_a_child_of_fork_searches_and_adds() -> None:
    db = VectorDatabase(D, threads=2)
    rows = vectors(5000)
    db.add(rows)
    expected = db.search(rows[:64], k=3).indices.tolist()  # the threads of the pool are running now
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        good = db.search(rows[:64], k=3).indices.tolist() == expected and db.add(rows[0]) == 5000
        db.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert db.search(rows[:64], k=3).indices.tolist() == expected
    assert db.count() == 5000
