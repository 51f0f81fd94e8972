"""Files of vectors and texts, read in batches.

| file | a row is |
| --- | --- |
| .npy | a line of a [rows, D] array of floats or integers; [D] is one row |
| .fvecs, .bvecs | int32 D, then D float32 or D bytes, little-endian |
| .jsonl | an object with "vector" (numbers) or "text" (to be embedded), maybe "id"; the rest is the row's metadata |
| .csv | numbers; or, below a line of names, fields as of .jsonl, a vector's numbers with spaces between |
| .txt | a line of text, to be embedded; blank lines are left out |
| .vdb | a row, with id and metadata |

A batch takes about 16 MB, however long the file is. Nothing here keeps state; a reader is a generator of batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ConfigError, DatabaseFileError, TextFileError, VectorError
from octavo.vdb import VectorDatabase
from octavo.vdb.embed import Embedder, Vectors
from octavo.vdb.lines import Line, read_lines
from octavo.vdb.rows import Metadata, Payload, pack

BATCH_BYTES = 1 << 24
BATCH_LINES = 1024
_VECS = {".fvecs": "<f4", ".bvecs": "u1"}


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file. `where` names the first in an error."""

    where: str
    vectors: Vectors  # [n, D]
    ids: list[str | None]
    metadata: list[Metadata]


def read(path: Path, embedder: Callable[[], Embedder]) -> Iterator[Batch]:
    """The rows of a file, in order. `embedder` is called when there are texts to embed, and not before.

    Raises TextFileError, VectorError, DatabaseFileError, ConfigError for a kind of file that is unknown, and what
    `embedder` raises.
    """
    if path.suffix in (".npy", *_VECS):
        try:
            array = _open_npy(path) if path.suffix == ".npy" else _open_vecs(path)
        except OSError as e:
            raise TextFileError(f"cannot read {path}: {e.strerror or e}") from e
        yield from _slices(path, array)
    elif path.suffix in (".jsonl", ".csv", ".txt"):
        lines = read_lines(path)
        while batch := list(islice(lines, BATCH_LINES)):
            yield _embedded(batch, embedder()) if batch[0].vector is None else _listed(batch)
    elif path.suffix == ".vdb":
        yield from _read_vdb(path)
    else:
        raise ConfigError(f"{path}: rows are read from .npy, .fvecs, .bvecs, .jsonl, .csv, .txt and .vdb files")


def no_texts() -> Embedder:
    """For `read`, where vectors alone are wanted. Raises ConfigError."""
    raise ConfigError("only vectors are taken here; `octavo vdb create` embeds texts")


def read_vectors(path: Path) -> Vectors:
    """All vectors of a file, [n, D]. Errors as for `read`."""
    batches = [batch.vectors for batch in read(path, no_texts)]
    if not batches:
        raise ConfigError(f"{path} holds no vectors")
    return np.concatenate(batches)


def split_width(batches: Iterator[Batch]) -> tuple[int, Iterator[Batch]]:
    """The dimensions of the first batch, and all batches."""
    first = next(batches, None)
    if first is None:
        raise ConfigError("the files hold no rows to take the dimensions from")
    return first.vectors.shape[1], chain([first], batches)


def open_any(path: Path) -> VectorDatabase:
    """A database to look at: mapped, or read into memory where it has the first format. Raises DatabaseFileError."""
    try:
        return VectorDatabase.open(str(path), mode="mmap")
    except DatabaseFileError:
        return VectorDatabase.open(str(path))  # says what is wrong, if anything is


def fvecs_row(dimensions: int, number: str = "<f4") -> np.dtype[Any]:
    """A row of an .fvecs file, or of one like it with other numbers."""
    return np.dtype([("dimensions", "<i4"), ("vector", number, (dimensions,))])


def _open_npy(path: Path) -> Any:
    """The mapped array [n, D] of floats or integers."""
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise VectorError(f"cannot read {path}: {str(e).splitlines()[0] if str(e) else 'it is no .npy file'}") from e
    found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
    if (
        not isinstance(array, np.ndarray)
        or array.ndim not in (1, 2)
        or array.dtype.kind not in "fiu"
        or not array.shape[-1]
    ):
        raise VectorError(f"{path} must hold a [rows, dimensions] array of floats or integers, not {found}")
    return array.reshape(-1, array.shape[-1])


def _open_vecs(path: Path) -> Any:
    """The mapped vectors [n, D]; every row must have as many numbers as the first."""
    size, number = path.stat().st_size, _VECS[path.suffix]
    with path.open("rb") as f:
        dimensions = int.from_bytes(f.read(4), "little", signed=True)
    if size == 0:
        return np.empty((0, 1), dtype=np.float32)
    if dimensions < 1 or size % fvecs_row(dimensions, number).itemsize:
        what = f"rows of {dimensions} {np.dtype(number).name}"
        raise VectorError(f"{path} is no {path.suffix} file, or is cut: {size} bytes are not {what}")
    array = np.memmap(path, dtype=fvecs_row(dimensions, number), mode="r")
    for start in range(0, len(array), step := _step(dimensions)):
        other = array["dimensions"][start : start + step] != dimensions
        if other.any():
            row = start + int(np.argmax(other))
            raise VectorError(f"{path}, row {row}: {array['dimensions'][row]} numbers, but row 0 has {dimensions}")
    return array["vector"]


def _slices(path: Path, array: Any) -> Iterator[Batch]:
    """Batches of an array [n, D] of floats or integers, which may lie in a mapped file."""
    for start in range(0, len(array), step := _step(array.shape[1])):
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which the database refuses
            vectors = np.array(array[start : start + step], dtype=np.float32, order="C")
        nothing: list[None] = [None] * len(vectors)
        yield Batch(f"{path}, rows from {start}", vectors, [*nothing], [*nothing])


def _step(dimensions: int) -> int:
    return max(1, BATCH_BYTES // (4 * dimensions))


def _read_vdb(path: Path) -> Iterator[Batch]:
    with open_any(path) as db:
        every = iter(db)
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


def _packed(line: Line, model: str | None) -> Metadata:
    try:
        return pack(Payload(line.text, model, line.metadata))
    except ConfigError as e:
        raise TextFileError(f"{line.where}: {e}") from e
