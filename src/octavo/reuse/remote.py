"""The server as a tier: records that several machines share, as far as the server's own policy keeps them.

A machine learns from the server's log what has changed, and reads the heads of what is new to it. A server that is away
is left alone for `PAUSE` seconds; then all that the log knows is looked at again.
"""

import io
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from octavo.errors import ReuseFileError
from octavo.kv.extent import Extent
from octavo.reuse.files import entry_in, extent_in, note, read_note, slots_nbytes
from octavo.reuse.record import Entry, Record
from octavo.reuse.resp import LARGEST, Found, RefusedError, Server

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore
    from octavo.reuse.tiers import Tiers

LOOK, SHARE = 0.05, 20  # seconds between two looks, which lie so many times as far apart as one takes at least
PAUSE = 30.0  # seconds for which a server that failed is left alone
BATCH, AIM = 64, 0.2  # heads that are read at once, fewer where that takes so many seconds
START, LATER = 10.0, 0.05  # seconds in which the first look and a later one begin to read heads; the next one goes on
LONGEST = 10**14  # milliseconds; what lives longer lives for ever


class Remote:
    """The server tier of a store (`octavo.reuse.tiers.Tier`)."""

    name = "remote"

    def __init__(self, store: "ReuseStore", tiers: "Tiers", server: Server) -> None:
        self.store, self.tiers, self.server = store, tiers, server
        self._next = self._until = self._full_until = -math.inf  # when it may be asked, and when it may be written to
        self.unreadable: set[str] = set()
        self._within, self._batch = START, 4  # 256 KB, which shows how fast the server is
        self._left: dict[str, None] = {}  # keys that are still to be looked at
        self._used: dict[str, None] = {}  # what was used since the last look
        self._removed: dict[str, None] = {}  # what must not be there, and may be still
        self._deleted: list[tuple[float, Callable[[Entry], bool]]] = []  # what must go, if it was stored before then
        self._doomed: dict[str, None] = {}  # what was found for that, by key
        self._count = 0  # of those of the last deletion
        self._scans = False  # whether the next look is to find what the log has lost, too
        self._noted: dict[str, tuple[float, float]] = {}  # (pinned, expires) that the server has not been told yet
        self._gaps = False  # whether it may lack what its records go on from, since it could not be written to

    @property
    def writable(self) -> bool:
        """Whether the server takes records, as far as is known."""
        return not self.store.index.away and time.monotonic() >= self._full_until

    @property
    def looking(self) -> bool:
        """Whether a look is not done yet, so that records may be there that go on from those that are known."""
        return bool(self._left)

    # Looking

    def refresh(self, patient: bool = False) -> None:
        """Take in what others have done, at most every `LOOK` seconds unless one is `patient`; in the store's lock."""
        began, index, within = time.monotonic(), self.store.index, self._within
        if began < self._until or (began < self._next and not patient):
            return
        self._within = LATER
        try:
            took = self._look(math.inf if patient else began + within)
        except OSError as e:
            self.store.counts["errors"] += 1
            self._fails(e)
            return
        except BaseException:  # interrupted: what was read of the log has not been taken in
            self.server.start_over()
            raise
        ended = time.monotonic()
        if not self._left:
            for key in self._doomed.keys() - index.records.keys():  # it had no room, or nothing before it is left
                self.removed(key)
            self._count, self._deleted, self._doomed = len(self._doomed), [], {}
        index.away = False
        self._next = -math.inf if self._left else ended + max(LOOK, SHARE * took)
        if (self._removed or self._noted) and self.writable:
            self.tiers.submit_once(self._send)
        if self._gaps and not self._left and self.writable:
            self._gaps = False
            self.tiers.write_before(index.remote.records)

    def _look(self, until: float) -> float:
        """Returns how long it took to ask whether there is anything new."""
        index, began = self.store.index, time.monotonic()
        whole, keys = self.server.changes(list(self._used))
        took = time.monotonic() - began
        self._used.clear()
        if whole:
            self._left = dict.fromkeys([*(record.key for record in index.remote.records), *index.waiting])
        self._left.update(dict.fromkeys([*keys, *index.ready]))
        index.ready.clear()
        if self._scans:
            self._left.update(dict.fromkeys(self.server.all_keys()))
            self._scans = False
        while self._left:
            asked, batch = time.monotonic(), list(itertools.islice(self._left, min(self._batch, BATCH)))
            found = self.server.look(batch, index.records.keys())
            self._batch = min(BATCH, 2 * len(batch)) if time.monotonic() - asked < AIM else max(1, len(batch) // 2)
            for key in batch:
                del self._left[key]
            new = [self._seen(key, each) for key, each in zip(batch, found, strict=True)]
            for record in sorted((r for r in new if r is not None), key=lambda r: (r.entry.first, r.entry.last)):
                self._adopt(record)
            self._left.update(index.ready)  # before anything is cut that they go on from
            index.ready.clear()
            if time.monotonic() > until:
                break
        return took

    def _seen(self, key: str, found: Found, again: bool = False) -> Record | None:
        """Take note of what lies under a key, `again`: for the second time; returns its record where that is new."""
        index = self.store.index
        known, noted = index.records.get(key), self._noted.get(key) or read_note(found.note)
        if found.nbytes and known is None and not found.head:
            return None  # it was dropped here or there in between: it waits for those before it, or the log will tell
        if not found.nbytes:
            index.waiting.pop(key, None)
            self.unreadable.discard(key)
            if known is not None and known.remote_nbytes:
                index.take_from_remote(known)
            return None
        if key in self._removed or key in self.unreadable:
            return None
        if known is not None:
            index.put_on_remote(known, found.nbytes)
            if noted is not None and key not in self._doomed:
                known.pinned, known.expires = noted
                index.soonest = min(index.soonest, known.ends)
            return None
        try:
            entry = self._entry(key, found.head, found.nbytes)
        except ReuseFileError as e:
            if not again:
                return self._seen(key, self.server.look([key], ())[0], again=True)
            self.tiers.damaged(self, key, e)
            return None
        record = Record(entry, slots_nbytes(entry))
        if noted is not None:
            record.pinned, record.expires = noted
        if any(entry.created <= when and fits(entry) for when, fits in self._deleted):
            self._doomed[key] = None
            record.pinned = record.expires = -math.inf  # nobody is given it, and it is cut where others go on from it
        record.remote_nbytes = found.nbytes
        return record

    def _adopt(self, record: Record) -> None:
        taken = self.tiers.adopt(record)
        if taken:
            self.store.index.remote.add(record)
            record.order = min(0, int(record.entry.created - self.store.clock()))  # before what was used here
        elif taken is not None:
            self.store.index.wait(record)

    def _fails(self, error: OSError) -> None:
        """Leave the server alone for a while. Inside the store's lock."""
        self._until, self.store.index.away, self._gaps = time.monotonic() + PAUSE, True, True
        self._left.clear()
        self._doomed.clear()
        self._scans = bool(self._deleted)
        self.server.start_over()
        told = f"{self.server.name}: {error}; it goes on without, and tries again every {PAUSE:.0f} s"
        self.store.warn("remote", f"the reuse cache cannot use {told}")

    # Reading

    def has(self, record: Record) -> bool:
        """Whether a record is on the server, as far as is known, and can be asked for."""
        return record.remote_nbytes > 0 and not self.store.index.away

    def read(self, record: Record) -> Extent:
        """A record's slots. Raises FileNotFoundError where the server has evicted it, ReuseFileError and OSError."""
        try:
            return self._read(record)
        except ReuseFileError:  # it may have been stored anew in between
            return self._read(record)

    def _read(self, record: Record) -> Extent:
        began, nbytes = time.perf_counter(), record.remote_nbytes
        try:
            data = self.server.read(record.key, nbytes)
            entry, extent = self._parsed(record.key, data)
            if entry.sizes != record.entry.sizes:
                raise FileNotFoundError("another machine, which rounds otherwise, has stored it anew")
            return extent
        except FileNotFoundError:
            with self.store.lock:
                self._left[record.key] = None  # look again at what there is
            raise
        except OSError as e:
            with self.store.lock:
                if isinstance(e, TimeoutError):  # it takes at least so long
                    self.store.costs.loaded(self.name, nbytes, time.perf_counter() - began)
                self._fails(e)
            raise

    def _parsed(self, key: str, data: bytearray) -> tuple[Entry, Extent]:
        """All of a value. Raises ReuseFileError unless it is whole, and the record that its key says."""
        entry = self._entry(key, data, len(data))
        return entry, extent_in(io.BytesIO(data), len(data), self._place(key), entry)

    def _entry(self, key: str, head: bytes | bytearray, nbytes: int) -> Entry:
        entry = entry_in(io.BytesIO(head), nbytes, self._place(key))
        if entry.key != key:
            raise ReuseFileError(f"{self._place(key)} holds another record than its name says")
        return entry

    def _place(self, key: str) -> str:
        return f"{self.server.value(key)} on {self.server.name}"

    def left(self, record: Record) -> list[Record]:
        """Take note that the server does not have a record; returns what is gone altogether. In the store's lock."""
        return self.store.index.take_from_remote(record)

    # Writing, all of it on the thread of `Tiers`

    def lacking(self, records: Sequence[Record]) -> list[Record]:
        """Those that the server does not have, of which it may have evicted some. Raises OSError."""
        if not self.writable:
            return []
        sizes = self.server.sizes([record.key for record in records])
        unheard = []
        with self.store.lock:
            for record, size in zip(records, sizes, strict=True):
                if size and not record.gone and record.key not in self.unreadable:
                    unheard += [] if record.remote_nbytes else [record.key]
                    self.store.index.put_on_remote(record, size)
        if unheard:  # the log may have lost them, and who comes later learns of them there alone
            self.server.say(unheard)
        return [record for record, size in zip(records, sizes, strict=True) if not size]

    def write(self, record: Record, pieces: Sequence[bytes | memoryview]) -> bool:
        """Write a record; False where it is not wanted any more, or is too large. Raises OSError."""
        store, size = self.store, sum(map(len, pieces))
        if record.gone:
            return False
        if size > LARGEST:
            store.counts["refused"] += 1
            store.warn("remote size", f"a prompt's {size:,} bytes are more than {self.server.name} takes at once")
            return False
        with store.lock:
            parents = [parent for parent in record.parents if parent.ends < record.ends]
            before = {parent.key: self._life(parent) for parent in parents}
            life, noted = self._life(record), note(record.pinned, record.expires) if record.noted else None
        self.server.write(record.key, pieces, life, noted, before)
        with store.lock:
            if not record.gone:  # what was deleted meanwhile is removed next
                store.index.put_on_remote(record, size)
        return not record.gone

    def failed(self, error: OSError) -> None:
        """Take note that writing failed, and warn: a server that is full or read-only can still be read."""
        if not isinstance(error, RefusedError):
            with self.store.lock:
                self._fails(error)
            return
        self._full_until, self._gaps = time.monotonic() + PAUSE, True
        told = f"the reuse cache cannot write to {self.server.name}: {error}; it goes on without"
        self.store.warn("writing remotely", told)

    def _life(self, record: Record) -> int | None:
        """For how many milliseconds the server must keep a record and what goes on from it. In the store's lock."""
        ends = max(each.ends for each in (record, *record.children))
        left = (ends - self.store.clock()) * 1000
        return None if left > LONGEST else max(1, math.ceil(left))

    def remove(self, record: Record) -> None:
        """Remove a record that was dropped; inside the store's lock."""
        self.store.index.waiting.pop(record.key, None)
        # One that is being written may be there soon, and nobody knows what a server has that is away. What has
        # expired the server lets go itself.
        index = self.store.index
        if record.remote_nbytes or record.users or (index.away and record.ends > index.now):
            self.removed(record.key)

    def removed(self, key: str) -> None:
        """Remove what lies under a key, as soon as the server can be asked."""
        self.store.index.waiting.pop(key, None)
        self._removed[key] = None
        self._noted.pop(key, None)
        self.tiers.submit_once(self._send)

    def delete(self, fits: Callable[[Entry], bool]) -> int:
        """Remove what is on the server, is not in the index, and fits, later where the server is away; returns how many
        there were now. Inside the store's lock."""
        self._deleted.append((math.inf, fits))  # whatever the clocks of others say
        self._count, self._scans = 0, True
        self.refresh(patient=True)
        if self._deleted:  # it is away, and what is stored from now on stays
            self._deleted[-1] = self.store.clock(), fits
        return self._count

    def note(self, record: Record) -> None:
        """Tell other machines until when a record is pinned and lives, as soon as the server can be asked."""
        with self.store.lock:
            self._doomed.pop(record.key, None)  # what was to be deleted was computed once more
            if record.remote_nbytes or self.store.index.away:
                self._noted[record.key] = record.pinned, record.expires
                self.tiers.submit_once(self._send)

    def _send(self) -> None:
        """Tell the server what it has not been told yet."""
        removed, noted, index = list(self._removed), dict(self._noted), self.store.index
        if index.away or not (removed or noted):
            return
        try:
            if removed:
                self.server.remove(removed)
            for key, (pinned, expires) in noted.items():
                with self.store.lock:
                    record = index.records.get(key)
                    life = self._life(record) if record is not None and record.remote_nbytes else 0
                if life != 0:
                    self.server.write_note(key, note(pinned, expires), life)
        except OSError as e:
            self.store.counts["errors"] += 1
            self.failed(e)
            return
        with self.store.lock:
            for key in removed:
                self._removed.pop(key, None)
            for key, told in noted.items():
                if self._noted.get(key) == told:
                    del self._noted[key]

    def touch(self, record: Record) -> None:
        """Have the next look tell the server that a record was used."""
        if record.remote_nbytes:
            self._used.pop(record.key, None)
            self._used[record.key] = None

    # Checking

    def keys(self) -> Sequence[str]:
        """The keys of all records on the server. Raises OSError."""
        return self.server.all_keys()

    def check(self, key: str) -> Entry:
        """Read and check all that lies under a key. Raises ReuseFileError and OSError."""
        (nbytes,) = self.server.sizes([key])
        return self._parsed(key, self.server.read(key, nbytes))[0]  # which says so where there is nothing
