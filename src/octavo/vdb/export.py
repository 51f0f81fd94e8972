"""Rows written to .jsonl, .npy and .fvecs files, batch by batch: the whole file or none."""

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from octavo.errors import ConfigError, OutputFileError
from octavo.vdb.rows import unpack
from octavo.vdb.sources import Batch, fvecs_row


def write(path: Path, batches: Iterable[Batch], dimensions: int) -> int:
    """Write all batches, and return how many rows they had: .npy and .fvecs take the vectors, [n, dimensions] float32.

    Raises OutputFileError, or ConfigError for a kind of file that is unknown.
    """
    kinds = {".npy": _write_npy, ".fvecs": _write_fvecs, ".jsonl": _write_jsonl}
    if path.suffix not in kinds:
        raise ConfigError(f"{path}: rows are written to .jsonl, .npy and .fvecs files")
    with _aside(path) as f:
        return kinds[path.suffix](f, batches, dimensions)


@contextmanager
def _aside(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path`, links followed, that takes its place and mode at the end."""
    target = path.resolve()
    part = target.with_name(f".{target.name[:60]}.{os.getpid()}.part")
    if target.exists() and not target.is_file():
        raise OutputFileError(f"cannot write {path}: it is a folder, a pipe or a device, not a regular file")
    try:
        with part.open("xb") as f:
            if target.exists():
                os.fchmod(f.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield f
            f.flush()
            os.fsync(f.fileno())
        part.replace(target)
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)


def _write_jsonl(f: IO[bytes], batches: Iterable[Batch], dimensions: int) -> int:
    """Lines that `octavo vdb create` reads: vector, id, text and metadata. float32 is written so that it comes back."""
    count = 0
    for batch in batches:
        for vector, name, metadata in zip(batch.vectors, batch.ids, batch.metadata, strict=True):
            payload = unpack(metadata)
            said: dict[str, Any] = {} if name is None else {"id": name}
            said |= {} if payload.text is None else {"text": payload.text}
            said |= {key: value for key, value in payload.metadata.items() if key not in ("id", "text", "vector")}
            numbers = ", ".join(np.format_float_scientific(number, trim="-") for number in vector)
            line = json.dumps(said, ensure_ascii=False)[1:-1]
            f.write(f'{{{line}{", " if line else ""}"vector": [{numbers}]}}\n'.encode())
            count += 1
    return count


def _write_npy(f: IO[bytes], batches: Iterable[Batch], dimensions: int) -> int:
    """The header is written twice: NumPy leaves room in it for the count, which is known at the end."""
    _npy_header(f, 0, dimensions)
    count = 0
    for batch in batches:
        f.write(batch.vectors.astype("<f4", copy=False).tobytes())
        count += len(batch.vectors)
    f.seek(0)
    _npy_header(f, count, dimensions)
    return count


def _npy_header(f: IO[bytes], count: int, dimensions: int) -> None:
    np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (count, dimensions)})


def _write_fvecs(f: IO[bytes], batches: Iterable[Batch], dimensions: int) -> int:
    count = 0
    for batch in batches:
        out = np.empty(len(batch.vectors), dtype=fvecs_row(dimensions))
        out["dimensions"], out["vector"] = dimensions, batch.vectors
        f.write(out.tobytes())
        count += len(batch.vectors)
    return count
