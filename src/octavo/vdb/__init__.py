"""A vector database in one C header, `vdb.h`, and its Python side. Imports neither torch nor numpy.

    db = VectorDatabase(384, metric="cosine", storage="f32+i8", index="hnsw")
    db.add(vectors, ids=["a", "b"], metadata=[b"...", None])  # [2, 384] float32
    hits = db.search(query, k=10)  # [384], or [n, 384] for a batch
    db.add(vector, ids="c", metadata={"year": 2021, "lang": "fr"})
    db.search(query, filter={"year": {"$gte": 2020}, "lang": {"$in": ["fr", "ru"]}})
    hits.distances, hits.indices, hits.ids
    db.save("x.vdb")  # a whole file
    db.add(vector, ids="d")
    db.save()  # what has changed, appended to it
    db = VectorDatabase.open("x.vdb", mode="mmap")

Vectors are float32: numpy arrays and everything else with the buffer protocol, torch tensors on the CPU, `bytes` of raw
float32, or lists of numbers. Exact search (index "flat", or `exact=True`) gives the same answer, bit for bit, on every
processor and for any number of threads. Every error is a `VectorDatabaseError` of `octavo.errors`, or a `ConfigError`
for a setting that cannot be; whatever raises has changed nothing.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from os import PathLike
from typing import Any, Literal, Self, cast, overload

from octavo.errors import ConfigError, UnknownIdError

try:
    from octavo.vdb import _vdb
    from octavo.vdb._vdb import Hits, HitsBatch, kernels, set_kernels, verify
except ImportError as error:
    raise ImportError(
        "octavo.vdb needs its C extension, which is not built: install a C compiler (gcc or clang) and run "
        f"`pip install -e .` in Octavo's folder ({error})"
    ) from error

_Path = str | bytes | PathLike[str] | PathLike[bytes]

__all__ = [
    "Hits",
    "HitsBatch",
    "Information",
    "Row",
    "VDBError",
    "VDBMetric",
    "VectorDatabase",
    "kernels",
    "set_kernels",
    "verify",
]


class VDBMetric(IntEnum):
    """What a distance is; every one ascends from the nearest."""

    COSINE = 0  # 1 - cos(q, x); 1 if either is zero
    EUCLIDEAN = 1  # with the root
    DOT_PRODUCT = 2  # negated


class VDBError(IntEnum):
    """The error codes of vdb.h. Python raises the errors of `octavo.errors` instead."""

    OK = 0
    NULL_POINTER = -1
    INVALID_DIMENSIONS = -2
    OUT_OF_MEMORY = -3
    NOT_FOUND = -4
    INVALID_INDEX = -5
    THREAD_FAILURE = -6
    NOT_FINITE = -7
    INVALID_ARGUMENT = -8
    DUPLICATE_ID = -9
    READ_ONLY = -10
    IO = -11
    CORRUPT = -12
    FULL = -13
    NOT_REGULAR = -14
    LINKED = -15
    OWNER = -16
    FOLDER = -17
    CHANGED = -18
    INTERRUPTED = -19


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `vector` [D] is float32 as stored: rounded, unless the storage keeps f32. `metadata` is as given."""

    index: int
    vector: "array[float]"
    id: str | None
    metadata: bytes | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Information:
    """A database in numbers."""

    dimensions: int
    metric: VDBMetric
    storage: str
    index: str
    links: int  # HNSW's M
    build_effort: int  # HNSW's efConstruction
    threads: int  # at most this many work on one call; 0 for every core
    count: int  # rows that can be found
    slots: int  # every index is below this
    bytes: int  # memory held, or the size of the mapped file
    vector_bytes: int  # of it, vectors and codes of the rows
    read_only: bool
    has_ids: bool


class VectorDatabase(_vdb.Database):
    """Rows of a vector of `dimensions` float32, maybe an id (text) and metadata, found by their nearest.

    Metadata is bytes, or a dict of str, int, float, bool and None that searches can filter by.

    `dimensions`: 1 to 65536. `metric`: "cosine", "euclidean", "dot", or a `VDBMetric`.
    `storage`: "f32"; "f32+i8", which also keeps a byte per number to scan first (a quarter more memory, about three
    times the speed, the same answers); "f16", "bf16" or "i8", which keep only the rounded vector.
    `index`: "flat" reads every row; "hnsw" keeps a graph that finds nearly all of the nearest by reading few.
    `links` (2 to 128) and `build_effort` (1 to 4096) are HNSW's M and efConstruction.
    `threads`: at most so many work on one call, None for every core; `multithreaded=False` means 1.

    Threads may share a database: any number read while one writes. A context manager closes it. `len(db)` counts rows,
    `id in db` looks one up. A child of fork() may go on using a database that no thread was inside of at the fork.
    """

    _file: str | None = None  # opened from or saved to last

    @classmethod
    def open(
        cls,
        path: _Path,
        mode: Literal["read", "mmap"] = "read",
        threads: int | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
        resident: int | None = None,
    ) -> Self:
        """Open a saved database, of this version or the first.

        mode "read": into memory, every checksum verified. mode "mmap": a read-only view of the file, which opens at
        once and is read as it is searched; its bounds are checked, its checksums only by `verify`. Changes that
        `save()` has appended are read and checked in either mode. threads: None for every core. progress: a function
        that is called with (bytes read, bytes of the file) about twenty times a second; what it raises ends the call,
        as Ctrl-C does. resident: for a mapped file, see `limit_resident`.
        Raises DatabaseFileError if the file is missing or damaged, ConfigError.
        """
        db = super().open(path, mode, threads, progress=progress)
        if resident is not None:
            db.limit_resident(resident)
        db._file = os.path.abspath(os.fsdecode(path))
        return db

    def save(self, path: _Path | None = None, mode: Literal["any", "new", "same"] = "any") -> None:
        """Write everything to a file; without a path, what has changed, to the file it came from.

        That is the file that it was opened from or saved to last. Flushed to disk, and whole or not at all, whatever
        happens meanwhile. With a path, a new file takes the old one's place, with its mode, owner and group. Symbolic
        links are followed. Refused: what is no regular file, a file with
        hard links, one whose owner cannot be kept, a folder that takes no new file. `mode`: what may be at the path:
        "any", "new" (nothing), or "same" (the file that this database was opened from or saved to last, unchanged).

        Without a path it must be that file, unchanged; rows added, removed and changed since are appended to it, and a
        new file is written where that is as good (after `compact`, or once appended changes are an eighth of the file).
        See `octavo.vdb.locks.locked` for changing a file that others change too.
        Raises DatabaseFileError, DatabaseClosedError, ConfigError.
        """
        if path is not None:
            super().save(path, mode)
            self._file = os.path.abspath(os.fsdecode(path))
            return
        if self._file is None:
            raise ConfigError("this database was neither opened from a file nor saved to one: give save() a path")
        if mode == "new":
            raise ConfigError("save() without a path goes to a file that is there: give mode 'new' a path")
        self._save_changes(self._file)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """`open(path)`, by the first version's name."""
        return cls.open(path)

    @property
    def metric(self) -> VDBMetric:
        """What a distance is."""
        return VDBMetric(self._metric)

    @overload
    def get(self, id: str | int | None = None, index: int | None = None) -> Row: ...
    @overload
    def get(self, id: list[str] | list[int] | list[str | int]) -> list[Row]: ...
    @overload
    def get(self, id: None = None, *, index: list[int]) -> list[Row]: ...
    def get(self, id: Any = None, index: Any = None) -> Row | list[Row]:
        """The row with this index, or the first with this id; a list of rows for a list. Raises UnknownIdError."""
        if isinstance(id, list) and index is None:
            return [self.get(one) for one in id]
        if isinstance(index, list) and id is None:
            return [self.get(index=one) for one in index]
        place, vector, name, metadata = self._row(id=id, index=index)
        return Row(place, array("f", vector), name, metadata)

    def __iter__(self) -> Iterator[Row]:
        """Every row, in the order of the indices, each read when it is asked for; rows may be removed meanwhile."""
        for index in self.indices():
            try:
                row = self.get(index=index)
            except UnknownIdError:
                continue
            yield row

    def indices(self) -> "memoryview[int]":
        """The index of every row [n], int64, ascending. What numpy makes of it without a copy: numpy.asarray(...)."""
        return memoryview(self._listing()[0]).cast("q")

    def ids(self) -> list[str | None]:
        """The id of every row, or None, in the order of `indices`."""
        return self._listing()[1]

    def vectors(self) -> "memoryview[float]":
        """Vectors of all indices [info().slots, D], float32, read-only; where there is no row it may be anything.

        Of a mapped file that keeps f32, unless rows have been appended to it, this is the file itself, without a copy,
        which stays open until the view is gone; otherwise a copy, rounded as stored.
        `numpy.asarray(db.vectors())[db.indices()]` are those of the rows.
        """
        try:
            return cast("memoryview[float]", memoryview(self))
        except BufferError:
            data = memoryview(self._vectors())
            slots = len(data) // (4 * self.dimensions)
            return data.cast("f", (slots, self.dimensions)) if slots else data.cast("f")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (bytes(self),)

    def info(self) -> Information:
        """Settings, rows and bytes. Raises DatabaseClosedError."""
        dimensions, metric, *others = self._facts()
        return Information(dimensions, VDBMetric(metric), *others)

    def __repr__(self) -> str:
        if self.closed:
            return "<VectorDatabase, closed>"
        facts = self.info()
        return (
            f"<VectorDatabase of {facts.count} rows, {facts.dimensions} dimensions, {facts.metric.name.lower()}, "
            f"{facts.storage}, {facts.index}>"
        )
