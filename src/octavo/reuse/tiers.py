"""What the tiers behind memory share: records are written behind the request, read when one needs them from the nearest
tier that has them, and taken in when others have stored them."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from octavo.errors import ReuseFileError
from octavo.kv.extent import Extent
from octavo.reuse.files import OtherFormatError, encoded
from octavo.reuse.record import Entry, Record
from octavo.reuse.remote import Remote
from octavo.reuse.resp import Server
from octavo.reuse.shelving import Shelving

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore

Pieces = Sequence[bytes | memoryview]


class Tier(Protocol):
    """Where records lie that outlive this process. What is inside the store's lock says so."""

    name: str
    unreadable: set[str]  # keys of what is damaged or of another version

    @property
    def writable(self) -> bool:
        """Whether records can be written here, as far as is known."""

    def refresh(self, patient: bool = False) -> None:
        """Take in what others have done, `patient`: all of it, however long it takes; inside the store's lock."""

    def has(self, record: Record) -> bool:
        """Whether a record can be read here, as far as is known."""

    def read(self, record: Record) -> Extent:
        """A record's slots. Raises ReuseFileError where they are damaged, OSError where they cannot be had."""

    def lacking(self, records: Sequence[Record]) -> list[Record]:
        """Those that are not here and may be written, in the same order. Raises OSError."""

    def write(self, record: Record, pieces: Pieces) -> bool:
        """Write a record after those before it; False where it has no room or is not wanted. Raises OSError."""

    def failed(self, error: OSError) -> None:
        """Take note that writing failed, and warn."""

    def left(self, record: Record) -> list[Record]:
        """Take note that a record is not here any more; returns what is gone altogether. Inside the store's lock."""

    def removed(self, key: str) -> None:
        """Remove what lies under a key."""

    def delete(self, fits: Callable[[Entry], bool]) -> int:
        """Remove what is here, is not in the index, and fits; returns how many there were. Inside the store's lock."""

    def note(self, record: Record) -> None:
        """Tell others until when a record is pinned and lives; never inside the store's lock."""

    def touch(self, record: Record) -> None:
        """Tell whoever makes room that a record was used."""

    def keys(self) -> Sequence[str]:
        """What lies here. Raises OSError."""

    def check(self, key: str) -> Entry:
        """Read and check all that lies under a key. Raises ReuseFileError and OSError."""


class Tiers:
    """The folder and the server of a store, the nearest first; either or both may be missing.

    One thread of its own writes, since that takes longer than a request should wait. Until then a record counts in the
    memory tier, or where that has no room, in nothing but the one record that is written.
    """

    def __init__(self, store: "ReuseStore", folder: Path | None, remote: Any) -> None:
        self.store = store
        self.folder = None if folder is None else Shelving(store, self, folder)
        self.remote = None if remote is None else Remote(store, self, Server(remote))
        self.each: list[Tier] = [tier for tier in (self.folder, self.remote) if tier is not None]
        self._writer: ThreadPoolExecutor | None = None
        self._writing: deque[tuple[Future[None], Record | None, bool]] = deque()
        self._asked: set[Callable[[], None]] = set()  # what is submitted by `submit_once`, and has not begun
        self._process = os.getpid()

    @property
    def writable(self) -> bool:
        """Whether what has no room in memory may have some elsewhere."""
        return any(tier.writable for tier in self.each)

    # Reading

    def refresh(self, patient: bool = False) -> None:
        """Take in what has come and gone, `patient`: all of it, however long it takes; inside the store's lock."""
        self._after_fork()
        for tier in self.each:
            tier.refresh(patient)

    def adopt(self, record: Record) -> bool | None:
        """Take in a record that was found on a tier; False where nothing holds the slots before its own, None where its
        bookkeeping has no room here. Inside the store's lock."""
        index, nbytes, counts = self.store.index, record.index_nbytes, self.store.counts
        parents = index.before(record)
        if parents is None:
            return False
        counts["evicted"] += len(index.forget_far(nbytes, parents))
        # Files are bounded by a budget of their own, and with no memory tier all of them are taken in.
        if index.index_nbytes + nbytes > index.most and (index.memory is not None or record.path is None):
            return None
        if index.memory is not None:
            gone = index.clear_memory(nbytes, "", parents)
            if gone is None:
                return None
            counts["evicted"] += len(gone)
        index.add(record, parents)
        if self.folder is not None and record.path is None:
            self.folder.link(record)
        return True

    def damaged(self, tier: Tier, key: str, error: ReuseFileError) -> None:
        """Take note of what is not whole, and remove it unless another version of Octavo wrote it."""
        tier.unreadable.add(key)
        self.store.counts["damaged"] += 1
        if not isinstance(error, OtherFormatError):
            tier.removed(key)
        self.store.warn("damaged", f"the reuse cache has dropped a file: {error}")

    def fetch(self, record: Record) -> Extent | None:
        """A record's slots, from memory or from the nearest tier that has them, whence they go to memory where there is
        room; None: they are gone, or were damaged and have been dropped."""
        store = self.store
        if record.extent is not None:
            return record.extent
        for tier in self.each:
            if not tier.has(record):
                continue
            began = time.perf_counter()
            try:
                extent = tier.read(record)
            except (ReuseFileError, OSError) as e:
                with store.lock:
                    self._lost(tier, record, e)
                continue
            with store.lock:
                store.costs.loaded(tier.name, extent.nbytes, time.perf_counter() - began)
                self.promote(record, extent)
            return extent
        return None

    def _lost(self, tier: Tier, record: Record, error: ReuseFileError | OSError) -> None:
        if isinstance(error, ReuseFileError):
            self.damaged(tier, record.key, error)
        elif not isinstance(error, FileNotFoundError):  # others may remove it at any time
            self.store.counts["errors"] += 1
        self.drop(tier, record, error)

    def drop(self, tier: Tier, record: Record, error: ReuseFileError | OSError) -> None:
        """Take note that a tier does not give a record any more; inside the store's lock."""
        for each in tier.left(record):
            if isinstance(error, ReuseFileError) and self.folder is not None:
                self.folder.remove(each)  # nothing can go on from these any more; a server's may serve others

    def promote(self, record: Record, extent: Extent) -> bool:
        """Put a record's slots into memory where there is room; inside the store's lock."""
        index = self.store.index
        if index.memory is None or record.gone or record.extent is not None:
            return False
        gone = index.clear_memory(record.nbytes, record.entry.tenant)
        if gone is None or record.gone:
            return False
        self.store.counts["evicted"] += len(gone)
        record.extent = extent
        index.memory.add(record)
        return True

    # Writing

    def submit(
        self, do: Callable[..., None], *arguments: Any, record: Record | None = None, stays: bool = True
    ) -> None:
        """Have something done behind the request, after all that was to be done before."""
        self._after_fork()
        with self.store.lock:
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, "octavo-reuse")
            while self._writing and self._writing[0][0].done():  # they end in this order
                self._writing.popleft()
            self._writing.append((self._writer.submit(do, *arguments), record, stays))

    def submit_once(self, do: Callable[[], None]) -> None:
        """Have something done behind the request, once for all that ask before it begins; inside the store's lock.

        A server that refuses to remove many records would be asked to as often as there are records otherwise.
        """
        self._after_fork()
        if do not in self._asked:
            self._asked.add(do)
            self.submit(self._begin, do)

    def _begin(self, do: Callable[[], None]) -> None:
        self._asked.discard(do)
        do()

    def write(self, record: Record, *, stays: bool) -> None:
        """Begin to write a record; `stays`: it has room in memory, so nobody need wait. Inside the store's lock."""
        if self.each:
            record.users += 1  # it must not leave before it is written
            self.submit(self._write, record, record.extent, stays, record=record, stays=stays)

    def write_before(self, records: Iterable[Record]) -> None:
        """Begin to write what records of the server go on from and it lacks; inside the store's lock.

        What was cut while it was away is such: without what was left of it nothing there could go on.
        """
        for parent in {parent for record in records for parent in record.parents if not parent.remote_nbytes}:
            self.write(parent, stays=True)

    def _write(self, record: Record, extent: Extent | None, stays: bool) -> None:
        """Write a record, after those before it that are not there yet: without them nothing can go on from it."""
        store, made = self.store, dict[Record, Pieces]()
        with store.lock:
            ordered = [*sorted(record.parents, key=lambda r: r.entry.first), record]
        try:
            for tier in self.each:
                try:
                    for each in tier.lacking(ordered):
                        slots = extent if each is record and extent is not None else self._slots(each)
                        if slots is None:
                            break
                        if each not in made:
                            made[each] = encoded(each.entry, slots)
                        if not tier.write(each, made[each]):
                            break
                except OSError as e:
                    store.counts["errors"] += 1
                    tier.failed(e)
        finally:
            self._written(record, stays)

    def _slots(self, record: Record) -> Extent | None:
        """A record's slots, which stay where they are."""
        found = record.extent
        for tier in self.each:
            if found is None and tier.has(record):
                try:
                    found = tier.read(record)
                except (ReuseFileError, OSError):
                    continue  # a request that needs it will find out
        return found

    def _written(self, record: Record, stays: bool) -> None:
        """Take note that nobody writes a record any more, whether it is anywhere or not."""
        with self.store.lock:
            record.users -= 1
            if not stays and not record.gone:
                record.extent = None
                if not record.behind:
                    self.store.forget(record)

    def remove(self, record: Record) -> None:
        """Remove a record that was dropped, wherever it is; inside the store's lock."""
        if self.folder is not None:
            self.folder.remove(record)
        if self.remote is not None:
            self.remote.remove(record)

    def delete(self, fits: Callable[[Entry], bool]) -> int:
        """Remove what this store could not take in, too; returns how many there were. Inside the store's lock."""
        return sum(tier.delete(fits) for tier in self.each)

    def note(self, record: Record) -> None:
        """Write down for others until when a record is pinned and lives; never inside the store's lock."""
        for tier in self.each:
            tier.note(record)

    def renewed(self, record: Record) -> None:
        """Take note that a record that was to be deleted stays, and tell others; inside the store's lock."""
        if self.each:
            self.submit(self.note, record)
            self.write(record, stays=self.store.in_memory(record))

    def touch(self, record: Record) -> None:
        """Take note for others that a record was used."""
        for tier in self.each:
            tier.touch(record)

    def _after_fork(self) -> None:
        """In a child process the parent's threads are missing: what they were writing or computing is theirs alone."""
        if self._process == os.getpid():
            return
        with self.store.lock:
            self._process, self._writer, left, self._writing = os.getpid(), None, self._writing, deque()
            self._asked = set()
            for future, record, stays in left:
                if record is not None and not future.done():
                    self._written(record, stays)
        self.store.flights.land_elsewhere()

    def flush(self) -> None:
        """Wait until all is written."""
        self._after_fork()
        for each, *_ in list(self._writing):
            each.result()

    def close(self) -> None:
        """Wait and end the thread."""
        self._after_fork()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
