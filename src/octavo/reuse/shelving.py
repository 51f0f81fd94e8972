"""Between a store and its folder: records are written behind the request, read when one needs them, and kept in step
with what other processes do there."""

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ReuseFileError
from octavo.kv.extent import Extent
from octavo.reuse.disk import Folder
from octavo.reuse.files import OtherFormatError, encoded, read_entry, read_extent
from octavo.reuse.record import Record

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore


SETTLED = 60.0  # seconds after which a file without the ones before it will not get them any more


class Shelving:
    """The disk tier of a store; without a folder it does nothing.

    A file is written by one thread of its own, since syncing takes longer than a request should wait. Until then its
    record counts in the memory tier, or where that has no room, in nothing but the one record that is written.
    """

    def __init__(self, store: "ReuseStore", path: Path | None) -> None:
        self.store = store
        self.folder = None if path is None else Folder(path)
        self.writable = self.folder is not None
        self._refused: set[str] = set()  # files that are damaged or of another version
        self._skipped = False  # whether there may be whole files that the last look did not take in
        self._writer: ThreadPoolExecutor | None = None
        self._writing: list[tuple[Future[None], Record, bool]] = []
        self._process = os.getpid()

    # Reading

    def refresh(self) -> None:
        """Take in files that have come and gone; inside the store's lock."""
        self._after_fork()
        if self.folder is None or not self.folder.changed():
            return
        index, files, self._skipped = self.store.index, self.folder.files(), False
        for record in [r for r in index.records.values() if r.path is not None and r.key not in files]:
            if record.key in index.records:
                index.take_from_disk(record)
        fresh = [key for key in files if key not in index.records and key not in self._refused]
        read = (self._read(key, files[key].nbytes) for key in fresh)
        found = [record for record in read if record is not None]
        used = {record.key: files[record.key].used for record in found}
        for record in sorted(found, key=lambda r: (r.entry.first, r.entry.last)):
            self._adopt(record)
        for order, key in enumerate(sorted(used, key=lambda k: used[k])):
            if key in index.records:
                index.records[key].order = order - len(used)  # all of them before what this process has used

    def _adopt(self, record: Record) -> None:
        """Take in a record that was found in the folder."""
        assert self.folder is not None
        index = self.store.index
        noted = self.folder.noted(record.key)
        if noted is not None:
            record.pinned, record.expires = noted
        if index.memory is not None and index.memory.rules.budget is not None:
            most = index.memory.rules.budget // 2
            if index.index_nbytes + record.index_nbytes > most or index.clear_memory(record.index_nbytes, "") is None:
                self._skipped = True
                return  # its bookkeeping has no room here; it stays for others
        if index.adopt(record):
            index.disk.add(record)
        elif not self._skipped and record.entry.created < self.store.clock() - SETTLED:
            self.remove(record)  # nothing can go on from it

    def _read(self, key: str, size: int) -> Record | None:
        assert self.folder is not None
        path = self.folder.file(key)
        try:
            entry = read_entry(path)
            if entry.key != key:
                raise ReuseFileError(f"{path} holds another record than its name says")
        except ReuseFileError as e:
            self.damaged(key, e)
            return None
        except OSError:
            self._skipped = True
            return None  # another process has removed it, or it cannot be read now
        slots = sum(
            math.prod(shape) * dtype.itemsize
            for n in entry.sizes.values()
            for dtype, shape in entry.layout.shapes(n, tail=False).values()
        )
        return Record(entry, slots, path=path, file_nbytes=size)

    def damaged(self, key: str, error: ReuseFileError) -> None:
        """Take note of a file that is not whole, and remove it unless another version of Octavo wrote it."""
        self._refused.add(key)
        self.store.counts["damaged"] += 1
        assert self.folder is not None
        if not isinstance(error, OtherFormatError):
            self.folder.remove(key)
        self.store.warn("damaged", f"the reuse cache has dropped a file: {error}")

    def fetch(self, record: Record) -> Extent | None:
        """A record's slots, from memory or from its file, which goes to memory where there is room; None: it is gone,
        or was damaged and has been dropped."""
        extent, path, store = record.extent, record.path, self.store
        if extent is not None:
            return extent
        if path is None:
            return None
        began = time.perf_counter()
        try:
            extent = read_extent(path, record.entry)
        except ReuseFileError as e:
            with store.lock:
                self.damaged(record.key, e)
                store.forget(record)
            return None
        except OSError:
            with store.lock:
                store.counts["errors"] += 1
                store.index.drop(record)  # a file that cannot be read now may be whole
            return None
        with store.lock:
            store.costs.loaded(extent.nbytes, time.perf_counter() - began)
            self._promote(record, extent)
        return extent

    def _promote(self, record: Record, extent: Extent) -> None:
        index = self.store.index
        if index.memory is None or record.gone:
            return
        gone = index.clear_memory(record.nbytes, record.entry.tenant)
        if gone is None or record.gone:
            return
        self.store.counts["evicted"] += len(gone)
        record.extent = extent
        index.memory.add(record)

    # Writing

    def write(self, record: Record, *, stays: bool) -> None:
        """Begin to write a new record; `stays`: it has room in memory, so nobody need wait. Inside the store's lock."""
        if self.folder is None or not self.writable:
            return
        self._after_fork()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "octavo-reuse")
        self._writing = [each for each in self._writing if not each[0].done()]
        extent = record.extent
        assert extent is not None
        record.users += 1  # it must not leave before it is written
        self._writing.append((self._writer.submit(self._write, record, extent, stays), record, stays))

    def _write(self, record: Record, extent: Extent, stays: bool) -> None:
        """Write a record, after those before it that are not there yet: without them nothing can go on from it."""
        store = self.store
        with store.lock:
            ordered = sorted(record.parents, key=lambda r: r.entry.first)
            before = [(r, r.extent) for r in ordered if r.path is None and r.extent is not None]
        try:
            for each, slots in [*before, (record, extent)]:
                self._write_file(each, slots)
        except OSError as e:
            store.counts["errors"] += 1
            folder = "" if self.folder is None else self.folder.path
            store.warn("writing", f"the reuse cache cannot write to {folder}: {e.strerror or e}; it goes on without")
        finally:
            self._written(record, stays)

    def _written(self, record: Record, stays: bool) -> None:
        """Take note that nobody writes a record any more, whether it is on disk or not."""
        with self.store.lock:
            record.users -= 1
            if not stays and not record.gone:
                record.extent = None
                if record.path is None:
                    self.store.forget(record)

    def _write_file(self, record: Record, extent: Extent) -> None:
        """Write one record's file unless it is there, is not wanted any more, or has no room. Raises OSError."""
        store, folder = self.store, self.folder
        assert folder is not None
        if record.path is not None or record.gone:
            return
        pieces = encoded(record.entry, extent)
        size = sum(map(len, pieces))
        with folder.locked():
            with store.lock:
                fits = not record.gone and self._make_room(record, size)
            path = folder.write(record.key, pieces) if fits else None
            with store.lock:
                if path is not None and not record.gone:
                    record.path, record.file_nbytes = path, size
                    store.index.disk.add(record)
                    for each in (record, *record.parents):
                        if each.pinned > 0 or each.expires != each.entry.expires:
                            self.note(each, locked=True)
                elif path is not None:
                    folder.remove(record.key)

    def _make_room(self, record: Record, size: int) -> bool:
        """Remove files until one more fits the budget; inside both locks. False where it does not."""
        assert self.folder is not None
        index, store = self.store.index, self.store
        self.refresh()
        ours = {r.key for r in index.disk.records}
        strangers = sum(found.nbytes for key, found in self.folder.files().items() if key not in ours)
        room = index.disk.leaving(size, record.entry.tenant, index.now, record.parents, fixed=strangers)
        if room is None or any(parent.path is None for parent in record.parents):
            store.counts["refused"] += room is None
            return False
        for victim in room:
            self.folder.remove(victim.key)
            store.counts["evicted"] += len(index.take_from_disk(victim))
        return True

    def remove(self, record: Record) -> None:
        """Remove a record's file, if it has one."""
        if self.folder is not None and record.path is not None:
            self.folder.remove(record.key)

    def touch(self, record: Record) -> None:
        """Take note for other processes that a record was used."""
        if self.folder is not None and record.path is not None and self.writable:
            self.folder.use(record.key)

    def note(self, record: Record, *, locked: bool = False) -> None:
        """Write down until when a record is pinned and lives; `locked`: within the folder's lock.

        Never within the store's lock otherwise, since whoever writes takes the folder's first.
        """
        if self.folder is not None and record.path is not None and self.writable:
            with suppress(OSError):
                self.folder.note(record.key, record.pinned, record.expires, locked=locked)

    def _after_fork(self) -> None:
        """In a child process the parent's threads are missing: what they were writing or computing is theirs alone."""
        if self._process == os.getpid():
            return
        with self.store.lock:
            self._process, self._writer, left, self._writing = os.getpid(), None, self._writing, []
            for future, record, stays in left:
                if not future.done():
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
