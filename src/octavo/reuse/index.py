"""All records of a store: found by tokens, kept within the tiers' budgets, never half there.

Nothing here locks or warns; `octavo.reuse.store` does both.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Set

from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.cover import Usable, usable
from octavo.reuse.record import Record, Tokens
from octavo.reuse.shelf import Rules, Shelf
from octavo.reuse.tree import Tree

MOST = 1000  # records of the server that wait for those before them
BOOKS = 2**29  # bytes of bookkeeping where there is no memory tier, half of whose budget bounds it otherwise
AT_ONCE = 1 / 64  # of these bytes: what is forgotten at once, since each time all are put in order


class Index:
    """The records by namespace and tokens, and what lies on which tier."""

    def __init__(self, memory: Rules | None, disk: Rules) -> None:
        self.trees: dict[str, Tree] = {}
        self.records: dict[str, Record] = {}
        self.index_nbytes = 0
        self.memory = None
        if memory is not None:  # what has no file is gone altogether when it leaves memory
            self.memory = Shelf(
                memory, lambda r: r.nbytes, self._may_leave_memory, lambda r: 0 if r.behind else r.index_nbytes
            )
        self.disk = Shelf(disk, lambda r: r.file_nbytes, self._may_leave_disk)
        self.remote = Shelf(Rules(None, disk.policy, {}), lambda r: r.remote_nbytes, lambda r, leaving: False)
        self.most = BOOKS if memory is None or memory.budget is None else memory.budget // 2
        self.away = False  # whether the server cannot be asked now
        # Records of the server that lack those before them, (namespace, where their slots begin) by key, and those of
        # them that may have got them.
        self.waiting: dict[str, tuple[str, int]] = {}
        self.ready: dict[str, None] = {}
        self.watch: Callable[[Record], None] | None = None  # told of each record that comes or goes
        self.now = 0.0  # what the store's clock said last
        self.soonest = math.inf  # when the first record expires, or earlier
        self._order = itertools.count(1)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the memory tier, and of all bookkeeping."""
        return self.index_nbytes + (0 if self.memory is None else self.memory.nbytes)

    # Looking

    def find(
        self, space: str, tokens: Tokens, layout: SnapshotLayout, within: Callable[[Record], bool] | None = None
    ) -> tuple[int, list[Usable]]:
        """(tokens of a prompt that records agree with, what holds of them).

        `within`: of which records that have not expired; None: of those whose slots can be had now.
        """
        within = self.reachable if within is None else within
        return self._find(space, tokens, layout, lambda r: r.ends > self.now and within(r))

    def reachable(self, record: Record) -> bool:
        """Whether a record's slots can be had now, as far as is known."""
        return record.extent is not None or record.path is not None or not self.away

    def _find(
        self, space: str, tokens: Tokens, layout: SnapshotLayout, suits: Callable[[Record], bool]
    ) -> tuple[int, list[Usable]]:
        tree = self.trees.get(space)
        if tree is None:
            return 0, []
        matched, agreed = tree.walk(tokens)
        return matched, usable({record: n for record, n in agreed.items() if suits(record)}, layout)

    # Changing

    def add(self, record: Record, parents: Iterable[Record]) -> None:
        """Take in a record that goes on from `parents`, which live as long as it does."""
        self.trees.setdefault(record.entry.space, Tree()).add(record)
        self.records[record.key] = record
        self.index_nbytes += record.index_nbytes
        record.order = next(self._order)
        self.soonest = min(self.soonest, record.ends)
        for parent in parents:
            record.parents.add(parent)
            parent.children.add(record)
        self.waiting.pop(record.key, None)
        entry = record.entry
        self.ready |= {
            key: None
            for key, (space, at) in self.waiting.items()
            if space == entry.space and entry.first < at <= entry.last
        }
        if self.watch is not None:
            self.watch(record)

    def before(self, record: Record) -> set[Record] | None:
        """What a record that was found behind memory goes on from; None where nothing holds those before its slots."""
        # What has expired counts: it will be cut, not dropped, where others go on from it.
        _, found = self._find(record.entry.space, record.entry.tokens, record.entry.layout, lambda r: True)
        return ancestors(found, record.entry.layout, record.entry.first)

    def forget_far(self, nbytes: int, spared: Collection[Record]) -> list[Record]:
        """Forget what lies on the server alone where so many bytes more of bookkeeping are too many; returns it.

        What was used longest ago goes first. The server keeps it, and who computes it once more learns of it again.
        """
        out: list[Record] = []
        if self.index_nbytes + nbytes <= self.most:
            return out
        goal = (1 - AT_ONCE) * self.most - nbytes
        far = [r for r in self.remote.records if r.extent is None and r.path is None and r.pinned <= self.now]
        left = sorted(far, key=lambda r: (max(r.order, 0), r.entry.created))  # used here, or stored anywhere
        count = -1
        while self.index_nbytes > goal and len(out) > count:  # until nothing is left that nothing goes on from
            count = len(out)
            for record in left:
                if self.index_nbytes > goal and not (
                    record.gone or record.children or record.users or record in spared
                ):
                    out += self.take_from_remote(record)
        return out

    def weigh(self, record: Record, nbytes: int) -> bool:
        """Count more bookkeeping of a record that is here, after others have left for it; False where it has no room
        or the record has gone."""
        if record.gone or (self.memory is not None and self.clear_memory(nbytes, "", {record}) is None) or record.gone:
            return False
        record.beside += nbytes
        self.index_nbytes += nbytes
        return True

    def drop(self, record: Record) -> list[Record]:
        """Forget a record and all that go on from it; returns them."""
        out, waiting = [], [record]
        while waiting:
            each = waiting.pop()
            waiting += each.children
            if self.records.pop(each.key, None) is not None:
                self._take_out(each)
                out.append(each)
        return out

    def _take_out(self, record: Record) -> None:
        tree = self.trees[record.entry.space]
        tree.remove(record)
        if not tree.root.children:
            del self.trees[record.entry.space]
        for parent in record.parents:
            parent.children.discard(record)
        self.index_nbytes -= record.index_nbytes
        for shelf in self.shelves:
            shelf.remove(record)
        record.gone = True
        if record.remote_nbytes:
            self.wait(record)
        if self.watch is not None:
            self.watch(record)

    def wait(self, record: Record) -> None:
        """Keep in mind a record of the server that nothing can go on from until those before it are here."""
        self.waiting[record.key] = (record.entry.space, record.entry.first)
        if len(self.waiting) > MOST:
            del self.waiting[next(iter(self.waiting))]

    def used(self, record: Record) -> None:
        """Take note that a request goes on from a record."""
        record.order = next(self._order)
        for shelf in self.shelves:
            shelf.used(record)

    @property
    def shelves(self) -> Iterator[Shelf]:
        """The tiers."""
        return (shelf for shelf in (self.memory, self.disk, self.remote) if shelf is not None)

    def take_from_memory(self, record: Record) -> list[Record]:
        """Free a record's memory; returns what is gone altogether."""
        assert self.memory is not None
        self.memory.remove(record)
        record.extent = None
        return [] if record.behind else self.drop(record)

    def take_from_disk(self, record: Record) -> list[Record]:
        """Take note that a record has no file any more; returns what is gone altogether."""
        self.disk.remove(record)
        record.path = None
        return self.drop(record) if record.extent is None and not record.behind else []

    def take_from_remote(self, record: Record) -> list[Record]:
        """Take note that the server does not have a record any more; returns what is gone altogether."""
        self.remote.remove(record)
        record.remote_nbytes = 0
        return self.drop(record) if record.extent is None and not record.behind else []

    def put_on_remote(self, record: Record, nbytes: int) -> None:
        """Take note that the server has a record, in so many bytes."""
        self.remote.remove(record)
        record.remote_nbytes = nbytes
        self.remote.add(record)

    def expired(self) -> list[Record]:
        """What has expired and no request goes on from."""
        if self.now < self.soonest:
            return []
        self.soonest = min((r.ends for r in self.records.values() if r.ends > self.now), default=math.inf)
        out = [r for r in self.records.values() if r.ends <= self.now]
        if any(r.users for r in out):
            self.soonest = self.now  # look again next time
        return [r for r in out if not r.users]

    def clear_memory(self, nbytes: int, tenant: str, spared: Collection[Record] = ()) -> list[Record] | None:
        """Make room in the memory tier; returns what is gone altogether, None where there can be none.

        What `spared` go on from stays too: what lies on the server alone is dropped with what it goes on from.
        """
        if self.memory is None:
            return None
        spared = {*spared, *(before for record in spared for before in record.parents)}
        room = self.memory.leaving(nbytes, tenant, self.now, spared, fixed=self.index_nbytes)
        return None if room is None else [gone for each in room for gone in self.take_from_memory(each)]

    # Who may leave

    def _may_leave_memory(self, record: Record, leaving: Set[Record]) -> bool:
        if record.path is not None:
            return True  # its file stays
        if record.pinned > self.now:
            return False  # the server's own policy may evict what is pinned
        return record.remote_nbytes > 0 or all(
            # What is on the server alone is forgotten with it; the server keeps it.
            child in leaving or (child.extent is None and child.path is None and child.children <= leaving)
            for child in record.children
        )

    def _may_leave_disk(self, record: Record, leaving: Set[Record]) -> bool:
        if record.pinned > self.now:
            return False
        others = record.children - leaving
        elsewhere = record.extent is not None or record.remote_nbytes > 0
        return not others or (elsewhere and all(child.path is None for child in others))


def ancestors(found: list[Usable], layout: SnapshotLayout, first: int) -> set[Record] | None:
    """The records that together have the kept slots of all positions below `first`; None where there are none."""
    at, chosen = 0, set()
    while at < first:
        offers = [(each.last, each.record) for each in found if each.first <= at < each.last]
        if not offers:
            return None
        at, record = max(offers, key=lambda offer: offer[0])
        chosen.add(record)
    return chosen
