"""One writer at a time for a database file: `with locked(path): open, change, save`.

The lock is `flock` on the file itself. Nothing is left behind, readers are not disturbed, and a killed process holds
nothing. Since a save puts a new file in the old one's place, whoever gets the lock looks whether the path still names
the locked file, and tries again if not.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike

from octavo.errors import DatabaseFileError


@contextmanager
def locked(path: str | PathLike[str], waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of a file that exists; wait for whoever has it.

    `waiting` is called once if it must be waited for. Save with mode="same" inside: that also notices programs that
    take no lock. Raises DatabaseFileError if the file cannot be opened.
    """
    file = _take(path, waiting)
    try:
        yield
    finally:
        os.close(file)  # and with it the lock


def _take(path: str | PathLike[str], waiting: Callable[[], object] | None) -> int:
    while True:
        file = _open(path)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                    waiting = None
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(path, file):
                return file
        except OSError as e:
            os.close(file)
            raise DatabaseFileError(f"cannot lock {os.fspath(path)}: {e.strerror}") from e
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _open(path: str | PathLike[str]) -> int:
    """Network file systems want a file open for writing if it is to be locked; others do not care."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            return os.open(path, os.O_RDWR | flags)
        except PermissionError:
            return os.open(path, os.O_RDONLY | flags)
    except OSError as e:
        raise DatabaseFileError(f"cannot open {os.fspath(path)}: {e.strerror}") from e


def _is_still(path: str | PathLike[str], file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
