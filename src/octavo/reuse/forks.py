"""Locks that a forked process finds free: one that another thread had at that moment would be held there for ever."""

import os
import threading
import weakref
from typing import Any

_locks: "weakref.WeakSet[Any]" = weakref.WeakSet()
_forking = threading.local()  # several threads may fork at once; a child goes on as the thread that did


def free_in_forks(lock: Any) -> None:
    """See to it that a process is forked only while this `threading.RLock` is the forking thread's; keeps it not."""
    _locks.add(lock)


def _take_all() -> None:
    _forking.taken = list(_locks)
    for lock in _forking.taken:
        lock.acquire()


def _give_back() -> None:
    for lock in _forking.taken:
        lock.release()
    _forking.taken = []


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is forked
    os.register_at_fork(before=_take_all, after_in_parent=_give_back, after_in_child=_give_back)
