"""Vectors written to .npy and .fvecs files, batch by batch: the whole file or none."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from octavo.errors import ConfigError, OutputFileError
from octavo.vdb.sources import Batch, fvecs_row


def write(path: Path, batches: Iterable[Batch], dimensions: int) -> int:
    """Write the vectors of all batches, [n, dimensions] float32, and return n.

    Raises OutputFileError, or ConfigError for a kind of file that is unknown.
    """
    kinds = {".npy": _write_npy, ".fvecs": _write_fvecs}
    if path.suffix not in kinds:
        raise ConfigError(f"{path}: vectors are written to .vdb, .npy and .fvecs files")
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
