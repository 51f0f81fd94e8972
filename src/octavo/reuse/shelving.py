"""The folder as a tier: files are written and read, and kept in step with what other processes do there."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ReuseFileError
from octavo.kv.extent import Extent
from octavo.reuse.disk import Folder
from octavo.reuse.files import read_entry, read_extent, slots_nbytes
from octavo.reuse.record import Entry, Record

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore
    from octavo.reuse.tiers import Tiers


SETTLED = 60.0  # seconds after which a file without the ones before it will not get them any more


class Shelving:
    """The disk tier of a store (`octavo.reuse.tiers.Tier`). Raises OutputFileError where the folder cannot be made."""

    name = "disk"
    writable = True

    def __init__(self, store: "ReuseStore", tiers: "Tiers", path: Path) -> None:
        self.store, self.tiers, self.folder = store, tiers, Folder(path)
        self.unreadable: set[str] = set()
        self._skipped = False  # whether there may be whole files that the last look did not take in

    # Reading

    def refresh(self, patient: bool = False) -> None:
        """Take in files that have come and gone; inside the store's lock."""
        if not self.folder.changed():
            return
        index, files, self._skipped = self.store.index, self.folder.files(), False
        for record in [r for r in index.records.values() if r.path is not None and r.key not in files]:
            if record.key in index.records:
                index.take_from_disk(record)
        fresh = [key for key in files if key not in index.records and key not in self.unreadable]
        read = (self._entry(key, files[key].nbytes) for key in fresh)
        found = [record for record in read if record is not None]
        used = {record.key: files[record.key].used for record in found}
        for record in sorted(found, key=lambda r: (r.entry.first, r.entry.last)):
            self._adopt(record)
        for order, key in enumerate(sorted(used, key=lambda k: used[k])):
            if key in index.records:
                index.records[key].order = order - len(used)  # all of them before what this process has used

    def _adopt(self, record: Record) -> None:
        """Take in a record that was found in the folder."""
        noted = self.folder.noted(record.key)
        if noted is not None:
            record.pinned, record.expires = noted
        taken = self.tiers.adopt(record)
        if taken:
            self.store.index.disk.add(record)
        elif taken is None:
            self._skipped = True  # it stays for others
        elif not self._skipped and record.entry.created < self.store.clock() - SETTLED:
            self.remove(record)  # nothing can go on from it

    def _entry(self, key: str, size: int) -> Record | None:
        path = self.folder.file(key)
        try:
            entry = read_entry(path)
            if entry.key != key:
                raise ReuseFileError(f"{path} holds another record than its name says")
        except ReuseFileError as e:
            self.tiers.damaged(self, key, e)
            return None
        except OSError:
            self._skipped = True
            return None  # another process has removed it, or it cannot be read now
        return Record(entry, slots_nbytes(entry), path=path, file_nbytes=size)

    def link(self, record: Record) -> None:
        """Take note of the file of a record that the server told of, if it has one; inside the store's lock.

        Its bookkeeping had no room when files were looked at, and while nobody knows of a file it is neither read nor
        removed.
        """
        with suppress(OSError):
            nbytes = self.folder.file(record.key).stat().st_size
            found = None if record.key in self.unreadable else self._entry(record.key, nbytes)
            whole = all(parent.path is not None for parent in record.parents)
            if found is not None and found.entry.sizes == record.entry.sizes and whole:
                record.path, record.file_nbytes = found.path, nbytes
                self.store.index.disk.add(record)

    def has(self, record: Record) -> bool:
        """Whether a record has a file."""
        return record.path is not None

    def read(self, record: Record) -> Extent:
        """A record's slots, from its file. Raises ReuseFileError and OSError."""
        return read_extent(record.path or self.folder.file(record.key), record.entry)

    def left(self, record: Record) -> list[Record]:
        """Take note that a file cannot be used; returns what is gone altogether. Inside the store's lock."""
        return self.store.index.take_from_disk(record)

    # Writing

    def lacking(self, records: Sequence[Record]) -> list[Record]:
        """Those that have no file."""
        return [record for record in records if record.path is None]

    def write(self, record: Record, pieces: Sequence[bytes | memoryview]) -> bool:
        """Write one record's file unless it is there, is not wanted any more, or has no room. Raises OSError."""
        store, folder = self.store, self.folder
        if record.path is not None or record.gone:
            return not record.gone
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
                        if each.noted:
                            self.note(each, locked=True)
                elif path is not None:
                    folder.remove(record.key)
        return record.path is not None

    def _make_room(self, record: Record, size: int) -> bool:
        """Remove files until one more fits the budget; inside both locks. False where it does not."""
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

    def failed(self, error: OSError) -> None:
        """Warn that a file cannot be written."""
        told = error.strerror or error
        self.store.warn("writing", f"the reuse cache cannot write to {self.folder.path}: {told}; it goes on without")

    def removed(self, key: str) -> None:
        """Remove a file."""
        self.folder.remove(key)

    def delete(self, fits: Callable[[Entry], bool]) -> int:
        """Remove the files that are not in the index and fit; returns how many. Inside the store's lock."""
        found = 0
        for key in self.folder.files():
            if key not in self.store.index.records and key not in self.unreadable:
                with suppress(ReuseFileError, OSError):  # it is no record, or gone
                    if fits(read_entry(self.folder.file(key))):
                        self.folder.remove(key)
                        found += 1
        return found

    def remove(self, record: Record) -> None:
        """Remove a record's file, if it has one."""
        if record.path is not None:
            self.folder.remove(record.key)

    def touch(self, record: Record) -> None:
        """Take note for other processes that a record was used."""
        if record.path is not None:
            self.folder.use(record.key)

    def note(self, record: Record, *, locked: bool = False) -> None:
        """Write down until when a record is pinned and lives; `locked`: within the folder's lock.

        Never within the store's lock otherwise, since whoever writes takes the folder's first.
        """
        if record.path is not None:
            with suppress(OSError):
                self.folder.note(record.key, record.pinned, record.expires, locked=locked)

    # Checking

    def keys(self) -> Sequence[str]:
        """The keys of all files."""
        return list(self.folder.files())

    def check(self, key: str) -> Entry:
        """Read and check a whole file. Raises ReuseFileError and OSError."""
        path = self.folder.file(key)
        entry = read_entry(path)
        read_extent(path, entry)
        if entry.key != key:
            raise ReuseFileError(f"{path} holds another record than its name says")
        return entry
