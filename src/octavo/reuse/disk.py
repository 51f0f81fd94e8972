"""A folder of records that several processes may read and write, and that no killed process leaves in disorder.

A record's file is written under a temporary name, synced and renamed, so a name that ends in `SUFFIX` is always that of
a whole file. Who writes or makes room holds a lock on the folder meanwhile, so all that ends otherwise under the lock
was left by a process that was killed.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from octavo.errors import OutputFileError
from octavo.reuse.files import note, read_note

TICK = 50_000_000  # nanoseconds
SUFFIX, ASIDE, NOTE, LOCK = ".kv", ".tmp", ".note", "lock"


class Found(NamedTuple):
    """A file in the folder; `used` is when it was used last, in nanoseconds."""

    nbytes: int
    used: int


class Folder:
    """The files of a disk tier. Raises OutputFileError where the folder can neither be read nor made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            os.listdir(path)
        except OSError as e:
            raise OutputFileError(f"cannot use {path} for a reuse cache: {e.strerror or e}") from e
        self.seen = -1  # when the folder had changed last as it was listed
        with suppress(OSError), self.locked():
            for name in os.listdir(path):
                if name.endswith(ASIDE):
                    (path / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else, in this process or another, writes or makes room meanwhile. Raises OSError."""
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing does not, where a child process has the handle since a fork
            os.close(handle)

    def changed(self) -> bool:
        """Whether files have come or gone since `files` looked."""
        try:
            return self.path.stat().st_mtime_ns != self.seen
        except OSError:
            return False

    def files(self) -> dict[str, Found]:
        """All records' files by their keys."""
        found = {}
        with suppress(OSError):
            changed = self.path.stat().st_mtime_ns
            # A clock that ticks slowly may give a file that comes right after this the same time.
            self.seen = -1 if time.time_ns() - changed < TICK else changed
            with os.scandir(self.path) as entries:
                for each in entries:
                    if each.name.endswith(SUFFIX):
                        with suppress(OSError):  # another process may remove it meanwhile
                            status = each.stat()
                            found[each.name.removesuffix(SUFFIX)] = Found(status.st_size, status.st_mtime_ns)
        return found

    def file(self, key: str) -> Path:
        """Where a record's file is, or would be."""
        return self.path / f"{key}{SUFFIX}"

    def write(self, key: str, pieces: Sequence[bytes | memoryview]) -> Path:
        """Write a record's file; inside the lock. Raises OSError, and nothing is left then."""
        self._replace(self.file(key), pieces)
        return self.file(key)

    def _replace(self, path: Path, pieces: Sequence[bytes | memoryview]) -> None:
        aside = path.with_name(f"{path.name}-{os.getpid()}{ASIDE}")
        try:
            with aside.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def remove(self, key: str) -> None:
        """Remove a record's file and its note; one that another process has removed is no mistake."""
        for path in (self.file(key), self.path / f"{key}{NOTE}"):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def use(self, key: str) -> None:
        """Take note that a record was used now, for every process that makes room."""
        with suppress(OSError):
            os.utime(self.file(key))

    def note(self, key: str, pinned: float, expires: float, *, locked: bool) -> None:
        """Keep until when a record is pinned and when it expires, seconds since the epoch; `locked`: inside the lock
        already. Raises OSError."""
        with nullcontext() if locked else self.locked():
            self._replace(self.path / f"{key}{NOTE}", [note(pinned, expires)])

    def noted(self, key: str) -> tuple[float, float] | None:
        """(pinned, expires) of a record of which `note` has said something; None: nothing, or nothing readable."""
        try:
            return read_note((self.path / f"{key}{NOTE}").read_bytes())
        except OSError:
            return None
