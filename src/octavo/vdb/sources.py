"""Files of vectors and texts, read in batches.

| file | a row is |
| --- | --- |
| .npy | a line of a [rows, D] float16, float32 or float64 array; [D] is one row |
| .fvecs | int32 D, then D float32, little-endian |
| .jsonl | an object with "vector" (numbers) or "text" (to be embedded), maybe "id"; the rest is the row's metadata |
| .txt | a line of text, to be embedded; blank lines are left out |
| .vdb | a row, with id and metadata |

A batch takes about 16 MB, however long the file is. Nothing here keeps state; a reader is a generator of batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ConfigError, DatabaseFileError, TextFileError, VectorError
from octavo.vdb import VectorDatabase
from octavo.vdb.embed import Embedder, Vectors
from octavo.vdb.lines import Line, read_lines
from octavo.vdb.rows import Payload, pack, rows

BATCH_BYTES = 1 << 24
BATCH_LINES = 1024


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file. `where` names the first in an error."""

    where: str
    vectors: Vectors  # [n, D]
    ids: list[str | None]
    metadata: list[bytes | None]


def read(path: Path, embedder: Callable[[], Embedder]) -> Iterator[Batch]:
    """The rows of a file, in order. `embedder` is called when there are texts to embed, and not before.

    Raises TextFileError, VectorError, DatabaseFileError, ConfigError for a kind of file that is unknown, and what
    `embedder` raises.
    """
    if path.suffix in (".npy", ".fvecs"):
        try:
            array = _open_npy(path) if path.suffix == ".npy" else _open_fvecs(path)
        except OSError as e:
            raise TextFileError(f"cannot read {path}: {e.strerror or e}") from e
        yield from _slices(path, array)
    elif path.suffix in (".jsonl", ".txt"):
        lines = read_lines(path)
        while batch := list(islice(lines, BATCH_LINES)):
            yield _embedded(batch, embedder()) if batch[0].vector is None else _listed(batch)
    elif path.suffix == ".vdb":
        yield from _read_vdb(path)
    else:
        raise ConfigError(f"{path}: rows are read from .npy, .fvecs, .jsonl, .txt and .vdb files")


def open_any(path: Path) -> VectorDatabase:
    """A database to look at: mapped, or read into memory where it has the first format. Raises DatabaseFileError."""
    try:
        return VectorDatabase.open(str(path), mode="mmap")
    except DatabaseFileError:
        return VectorDatabase.open(str(path))  # says what is wrong, if anything is


def fvecs_row(dimensions: int) -> np.dtype[Any]:
    """A row of an .fvecs file."""
    return np.dtype([("dimensions", "<i4"), ("vector", "<f4", (dimensions,))])


def _open_npy(path: Path) -> Any:
    """The mapped array [n, D] of any float dtype."""
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise VectorError(f"cannot read {path}: {str(e).splitlines()[0] if str(e) else 'it is no .npy file'}") from e
    found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind != "f" or not array.shape[-1]:
        raise VectorError(f"{path} must hold a [rows, dimensions] array of float16, float32 or float64, not {found}")
    return array.reshape(-1, array.shape[-1])


def _open_fvecs(path: Path) -> Any:
    """The mapped vectors [n, D]; every row must have as many numbers as the first."""
    size = path.stat().st_size
    with path.open("rb") as f:
        dimensions = int.from_bytes(f.read(4), "little", signed=True)
    if size == 0:
        return np.empty((0, 1), dtype=np.float32)
    if dimensions < 1 or size % (4 + 4 * dimensions):
        raise VectorError(f"{path} is no .fvecs file, or is cut: {size} bytes are not rows of {dimensions} float32")
    array = np.memmap(path, dtype=fvecs_row(dimensions), mode="r")
    for start in range(0, len(array), step := _step(dimensions)):
        other = array["dimensions"][start : start + step] != dimensions
        if other.any():
            row = start + int(np.argmax(other))
            raise VectorError(f"{path}, row {row}: {array['dimensions'][row]} numbers, but row 0 has {dimensions}")
    return array["vector"]


def _slices(path: Path, array: Any) -> Iterator[Batch]:
    """Batches of an array [n, D] of any float dtype, which may lie in a mapped file."""
    for start in range(0, len(array), step := _step(array.shape[1])):
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which the database refuses
            vectors = np.array(array[start : start + step], dtype=np.float32, order="C")
        nothing: list[None] = [None] * len(vectors)
        yield Batch(f"{path}, rows from {start}", vectors, [*nothing], [*nothing])


def _step(dimensions: int) -> int:
    return max(1, BATCH_BYTES // (4 * dimensions))


def _read_vdb(path: Path) -> Iterator[Batch]:
    with open_any(path) as db:
        every = rows(db)
        while batch := list(islice(every, _step(db.dimensions))):
            vectors = np.stack([np.frombuffer(row.vector, dtype=np.float32) for row in batch])
            ids, metadata = [row.id for row in batch], [row.metadata for row in batch]
            yield Batch(f"{path}, rows from {batch[0].index}", vectors, ids, metadata)


def _embedded(lines: list[Line], model: Embedder) -> Batch:
    packed = [_packed(line, model.name) for line in lines]  # first, for it may refuse and is fast
    vectors = model.embed([line.text or "" for line in lines])
    return Batch(lines[0].where, vectors, [line.id for line in lines], packed)


def _listed(lines: list[Line]) -> Batch:
    try:
        with np.errstate(over="ignore"):
            vectors = np.array([line.vector for line in lines], dtype=np.float64).astype(np.float32)
    except OverflowError as e:
        raise VectorError(f"{lines[0].where} and on: a number is beyond float32") from e
    return Batch(lines[0].where, vectors, [line.id for line in lines], [_packed(line, None) for line in lines])


def _packed(line: Line, model: str | None) -> bytes | None:
    try:
        return pack(Payload(line.text, model, line.metadata))
    except ConfigError as e:
        raise TextFileError(f"{line.where}: {e}") from e
