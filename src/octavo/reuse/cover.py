"""Which boundary of a prompt can be gone on from, and which record gives which of the slots that are needed there.

At boundary p with a window w and shift s a query sees kept slots of positions 0 ... p - s - 1 and marked ones of
p - w ... p - s - 1; with s = 1 also all slots of position p - 1. A position's marked slots must come from the record
that gives its kept ones: two records may have decided on a token differently, since gates are computed to rounding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo.kv.extent import Interval, joined
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.record import Record


@dataclass(frozen=True)
class Usable:
    """What of a record holds for a prompt: kept slots of positions `first` up to `last`, marked ones in `held`.

    `agreed`: tokens that it shares with the prompt. The newest token's slots are the same whatever its mark becomes.
    """

    record: Record
    first: int
    last: int
    held: tuple[Interval, ...]
    agreed: int

    def complete(self, position: int) -> bool:
        """Whether all slots of a position are there, marked or not."""
        entry = self.record.entry
        if position >= self.agreed:
            return False
        return (position == entry.last and entry.newest) or any(a <= position < b for a, b in entry.held)


class Share(NamedTuple):
    """What a record gives: kept slots of positions `first` up to `last`, marked ones from `tail` on."""

    record: Record
    first: int
    last: int
    tail: int


@dataclass(frozen=True)
class Plan:
    """How a sequence is put together at a boundary; `newest` has its newest token where the mark is open (shift 1)."""

    boundary: int
    shares: tuple[Share, ...]
    newest: Record | None

    @property
    def records(self) -> set[Record]:
        """All records that take part."""
        return {share.record for share in self.shares} | ({self.newest} if self.newest else set())


NOTHING = Plan(0, (), None)


def usable(agreed: Mapping[Record, int], layout: SnapshotLayout) -> list[Usable]:
    """What holds of records that agree with a prompt in so many tokens."""
    found = []
    for record, depth in agreed.items():
        entry, shift = record.entry, layout.shift
        last = min(entry.last, depth - shift)  # what the tokens up to there have decided
        held = ((entry.first, last),) if layout.window is None else entry.held
        clipped = tuple((a, min(b, last)) for a, b in held if a < last)
        if entry.first < depth:
            found.append(Usable(record, entry.first, max(last, entry.first), clipped, depth))
    return sorted(found, key=lambda u: (u.first, -u.last))


def reach(found: Iterable[Usable]) -> int:
    """Up to which position kept slots follow each other without a gap; `found` as `usable` orders it."""
    at = 0
    for each in found:
        if each.first <= at:
            at = max(at, each.last)
    return at


def longest(found: Sequence[Usable], layout: SnapshotLayout, limit: int) -> int:
    """The last boundary up to `limit` that can be gone on from, 0 for none."""
    kept, window, shift = reach(found), layout.window, layout.shift
    if window is None:
        return min(kept, limit)
    best = 0
    for low, high in joined([interval for each in found for interval in each.held]):
        if low > kept:
            continue
        for p in (min(high, limit), min(high + shift, limit)):
            enough = low <= max(0, p - window) and p - shift <= high
            if enough and p > best and (not shift or any(each.complete(p - 1) for each in found)):
                best = p
    return best


def plan(found: Sequence[Usable], layout: SnapshotLayout, boundary: int) -> Plan:
    """Who gives what at a boundary that `longest` names."""
    if boundary == 0:
        return NOTHING
    decided = boundary - layout.shift
    tail = decided if layout.window is None else min(decided, max(0, boundary - layout.window))
    shares: list[Share] = []
    at = 0
    while at < decided:
        if at < tail:
            offers = [(min(each.last, tail), each) for each in found if each.first <= at < each.last]
        else:
            offers = [(min(b, decided), each) for each in found for a, b in each.held if a <= at < b]
        end, chosen = max(offers, key=lambda offer: (offer[0], offer[1].record.extent is not None))
        before = shares[-1] if shares and shares[-1].record is chosen.record else None
        if before is not None:
            shares[-1] = before._replace(last=end)
        else:
            shares.append(Share(chosen.record, at, end, max(at, tail)))
        at = end
    newest = None
    if layout.shift:
        newest = next(each.record for each in found if each.complete(boundary - 1))
    return Plan(boundary, tuple(shares), newest)


def missing(wanted: Iterable[Interval], found: Sequence[Usable], layout: SnapshotLayout) -> tuple[Interval, ...]:
    """What of some intervals nobody holds marked slots for."""
    there, out = joined([interval for each in found for interval in each.held]), []
    for low, high in joined(list(wanted)):
        at = low
        for a, b in there:
            if b <= at or a >= high:
                continue
            if a > at:
                out.append((at, a))
            at = max(at, b)
        if at < high:
            out.append((at, high))
    return tuple(out)
