"""A stretch of a sequence, kept apart from any pages: what the reuse cache stores, cuts and puts together again.

Slots that are kept for ever are ordered by position, so a stretch can be cut anywhere. Marked slots are kept for some
intervals of positions only: a sequence can go on at boundary p where the marked slots of the last window before p are
there. Several boundaries within a window share them.

All numbers here are positions. With shift 1 the mark of position i is decided by the token at i + 1, so after p tokens
the positions below p - 1 are decided, and position p - 1 has a slot in every head that is neither kept nor marked yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from octavo.config import NEVER
from octavo.errors import CacheStateError
from octavo.kv.capture import kept_and_tail, trimmed
from octavo.kv.hosted import host
from octavo.kv.memory import bookkeeping
from octavo.kv.ragged import between, heads, merged, picked
from octavo.kv.restoring import Stretch, layout_of, stretch, whole
from octavo.kv.sequences import Sequences
from octavo.kv.snapshot import Ragged, SnapshotLayout

Interval = tuple[int, int]  # positions from the first up to, not including, the last


@dataclass(frozen=True, eq=False)
class Extent:
    """The slots of positions `first` up to, not including, `last` of a sequence, on the host.

    `kept`: those that are kept for ever. `marked`: the marked ones of the intervals `held`, which lie within first and
    last and rise; a marked slot's expiry is its position + window. `newest`: with shift 1 the slots of position `last`
    in all heads, where the sequence was read up to it; its mark is open.
    """

    layout: SnapshotLayout
    first: int
    last: int
    kept: Ragged
    marked: Ragged
    held: tuple[Interval, ...]
    newest: Ragged | None = None

    @property
    def parts(self) -> dict[str, Ragged]:
        """The slots by the names that they have here."""
        named = {"kept": self.kept, "marked": self.marked, "newest": self.newest}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for part in self.parts.values() for t in part.tensors.values())

    def cut(self, last: int) -> "Extent":
        """The same up to, not including, position `last`."""
        held = tuple((a, min(b, last)) for a, b in self.held if a < last)
        kept, marked = (between(part, self.first, last) for part in (self.kept, self.marked))
        newest = merged(self.at(last)) if self.layout.shift and self.complete(last) else None
        return replace(self, last=last, kept=kept, marked=marked, held=held, newest=newest)

    def complete(self, position: int) -> bool:
        """Whether the slots of a position are there in all heads, marked or not."""
        if position == self.last:
            return self.newest is not None
        return any(a <= position < b for a, b in self.held)

    def at(self, position: int) -> list[Ragged]:
        """The slots of one complete position."""
        if position == self.last:
            assert self.newest is not None
            return [self.newest]
        return [between(part, position, position + 1) for part in (self.kept, self.marked)]


class Piece(NamedTuple):
    """What an extent gives to a sequence: kept slots of positions `first` up to, not including, `last`, marked slots
    from position `tail` on."""

    extent: Extent
    first: int
    last: int
    tail: int


def assembled(pieces: Sequence[Piece], newest: Extent | None, boundary: int) -> list[Stretch]:
    """The slots that a query at a boundary sees, from pieces that follow each other up to it.

    `newest`: with shift 1 the extent that has the slots of the newest token, which are the last part then.
    """
    parts = []
    for extent, first, last, tail in pieces:
        parts.append(stretch(extent.kept, first, last))
        if tail < last:
            parts.append(stretch(extent.marked, tail, last, extent.layout.window or 0))
    if newest is not None:
        slots = merged(newest.at(boundary - 1))
        parts.append(whole(slots._replace(expiry=torch.full_like(slots.position, NEVER))))  # their marks are open
    return parts


@bookkeeping
def extent_of(sequences: Sequences, which: int, first: int, held: Sequence[Interval]) -> Extent:
    """One sequence's stretch from position `first` to its end, on the host.

    `held`: intervals of positions whose marked slots are wanted, each within the window before a boundary that was
    kept or the end; what of them is not to be had is left out. Waits for the device. Raises CacheStateError where so
    much was not read.
    """
    sequences.settle()
    tables, row, shift = sequences.tables, sequences.rows[which], sequences.shift
    pool, layout = tables.pool, layout_of(tables, shift)
    with pool.lock:
        end = int(tables.position[row])
        if not 0 <= first <= end - shift:
            raise CacheStateError(f"a stretch from position {first} lies not within the {end} tokens that were read")
        known = {p: t for t in sequences.boundaries.of(row) if first < (p := int(t.position)) <= end}
        kept, tail = kept_and_tail(tables, row, first, shift)
    ends = [*(p for p in sorted(known) if p < end), end]
    marked, there = [], []
    for low, high in held:
        at = low
        for p in ends:
            a, b = max(at, first, p - (layout.window or 0)), min(high, p if p < end else end - shift)
            if a < b:  # the tails of many boundaries together may be more than all that the sequence holds
                part = between(tail if p == end else trimmed(pool.pages, known[p]), a, b)
                marked.append(_without(part, kept, p - 1) if shift else part)
                there.append((a, b))
                at = b
    slots = merged([*marked, _none_of(kept)])._replace(expiry=None)
    newest = host(between(tail, end - 1, end)._replace(expiry=None)) if shift else None
    return Extent(layout, first, end - shift, host(kept), host(slots), joined(there), newest)


def joined(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The same positions as intervals that rise and do not touch."""
    out: list[Interval] = []
    for a, b in sorted(each for each in intervals if each[0] < each[1]):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(b, out[-1][1])
        else:
            out.append((a, b))
    return tuple(out)


def _none_of(part: Ragged) -> Ragged:
    """No slots, in the form of a part with expiries."""
    empty = picked(part, part.position.new_zeros(0, dtype=torch.int64), torch.zeros_like(part.counts))
    return empty._replace(expiry=torch.full_like(empty.position, NEVER))


def _without(part: Ragged, kept: Ragged, position: int) -> Ragged:
    """Some slots but those of a position that turned out to be kept for ever: of a boundary's newest token, which has a
    slot in every head there, only the marked ones."""
    there = heads(kept)[kept.position == position]
    stays = (part.position != position) | ~torch.isin(heads(part), there)
    index = stays.nonzero()[:, 0]
    counts = torch.bincount(heads(part)[index], minlength=part.counts.numel()).view(part.counts.shape)
    return picked(part, index, counts.int())
