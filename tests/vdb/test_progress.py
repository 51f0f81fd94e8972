"""Long builds and loads tell how far they are, and end when they are asked to, with the database as it was."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ConfigError
from octavo.vdb import VectorDatabase


class Enough(Exception):
    pass


def vectors(rows: int, dimensions: int = 32) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, dimensions)).astype(np.float32)


def stop_after(calls: int, told: list[tuple[int, int]]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == calls:
            raise Enough

    return progress


def test_a_build_tells_how_far_it_is() -> None:
    db, told = VectorDatabase(32, index="hnsw", threads=1), []
    db.add(vectors(3000), progress=lambda *said: told.append(said))
    assert len(db) == 3000
    assert len(told) >= 2
    assert told == sorted(told)
    assert all(0 <= done <= total == 3000 for done, total in told)


@pytest.mark.parametrize("calls", [1, 3])
def test_what_progress_raises_ends_a_build(calls: int) -> None:
    db, told = VectorDatabase(32, index="hnsw", threads=2), []
    db.add(vectors(500), ids=[str(i) for i in range(500)], metadata=[{"i": i} for i in range(500)])
    before = bytes(db)
    with pytest.raises(Enough):
        db.add(vectors(20000), ids=[f"new {i}" for i in range(20000)], progress=stop_after(calls, told))
    assert len(told) == calls
    assert len(db) == 500
    assert "new 0" not in db
    rows = list(VectorDatabase.from_bytes(before))
    assert list(db) == rows
    query = vectors(1)[0]
    assert db.search(query, k=500, exact=True) == VectorDatabase.from_bytes(before).search(query, k=500, exact=True)
    db.add(vectors(100))
    assert len(db) == 600


def test_what_progress_raises_ends_an_add_without_a_graph() -> None:
    db, told = VectorDatabase(256, storage="f32+i8", threads=1), []
    db.add(vectors(10, 256))
    before = bytes(db)
    with pytest.raises(Enough):
        db.add(vectors(20000, 256), replace=True, progress=stop_after(1, told))
    assert told == [(0, 20000)]
    assert len(db) == 10
    assert list(db) == list(VectorDatabase.from_bytes(before))
    assert db.add(vectors(1, 256)) == [10]


def test_a_load_tells_how_far_it_is_and_can_be_ended(tmp_path: Path) -> None:
    path, told = tmp_path / "x.vdb", []
    db = VectorDatabase(256)
    for _ in range(8):
        db.add(vectors(10000, 256))
    db.save(path)
    again = VectorDatabase.open(path, threads=1, progress=lambda *said: told.append(said))
    assert len(again) == 80000
    assert told
    assert told == sorted(told)
    assert all(0 < done <= total == path.stat().st_size for done, total in told)
    for threads in (1, 2):
        told.clear()
        with pytest.raises(Enough):
            VectorDatabase.open(path, threads=threads, progress=stop_after(1, told))
    assert len(VectorDatabase.open(path, mode="mmap", progress=lambda *_: None)) == 80000
    for bad in (3, "words"):
        with pytest.raises(ConfigError, match="progress must be a function"):
            VectorDatabase.open(path, progress=bad)  # type: ignore[arg-type]


def test_a_signal_ends_a_build_at_once() -> None:
    db = VectorDatabase(32, index="hnsw", threads=1)
    data, sent = vectors(100_000), []
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.4, interrupt)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            db.add(data)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, earlier)
    took = time.monotonic() - sent[0]
    assert took < 2, f"{took:.2f} s; 0.2 s where nobody else is at work"
    assert len(db) == 0
