"""How a prompt is put together from stretches of others: who gives which token, and which must be computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.reuse.align import Run
from octavo.reuse.cover import Usable
from octavo.reuse.record import Record, Tokens


class Lent(NamedTuple):
    """What a record, whose extent may be on disk, gives; see `octavo.reuse.similar.Taken`."""

    record: Record
    first: int
    last: int
    by: int
    marked: bool
    exact: bool


@dataclass(frozen=True)
class Draft:
    """How a prompt without its last token is put together: what is `lent`, and the positions to be `computed`, in
    order. `fixed`: tokens of the prompt's beginning that are exact."""

    tokens: Tokens
    lent: tuple[Lent, ...]
    computed: NDArray[np.int64]
    fixed: int

    @property
    def reused(self) -> int:
        """Tokens that need not be computed."""
        return len(self.tokens) - 1 - len(self.computed)


class Coverage:
    """Which usable record has each token of a source, and whether with its marked slots."""

    def __init__(self, found: Sequence[Usable], length: int) -> None:
        self.records = [each.record for each in found]
        self.owner = np.full(length, -1)  # index of the record, -1: nobody has it
        self.whole = np.zeros(length, bool)  # with its marked slots
        for i, each in enumerate(found):
            part = self.owner[each.first : each.last]
            part[part < 0] = i
        for i, each in enumerate(found):
            for a, b in each.held:
                new = ~self.whole[a:b]
                self.owner[a:b][new], self.whole[a:b] = i, True


def put_together(ids: Tokens, runs: Sequence[Run], held: Sequence[Coverage], window: int | None, fixed: int) -> Draft:
    """Who gives which token: what is not held, or lacks marked slots that a computed token must see, is computed."""
    limit = len(ids) - 1
    source, place = np.full(limit, -1), np.zeros(limit, np.int64)
    whole = np.zeros(limit, bool)
    for run in runs:
        inside, there = slice(run.at, run.at + run.length), slice(run.first, run.first + run.length)
        has = held[run.source].owner[there] >= 0
        source[inside] = np.where(has, run.source, -1)
        place[inside] = np.arange(run.first, run.first + run.length)
        whole[inside] = held[run.source].whole[there] & has
    seen = np.ones(limit, bool)  # whether a computed token sees the marked slots of a position
    if window is not None:
        following = limit
        for p in range(limit - 1, -1, -1):
            seen[p] = following - p <= window
            if source[p] >= 0 and seen[p] and not whole[p]:
                source[p] = -1
            if source[p] < 0:
                following = p
    lent: list[Lent] = []
    for p in np.flatnonzero(source >= 0).tolist():
        coverage, first = held[source[p]], int(place[p])
        marked, exact = bool(seen[p] and window), p < fixed
        piece = Lent(coverage.records[coverage.owner[first]], first, first + 1, p - first, marked, exact)
        if lent and lent[-1]._replace(first=first, last=first + 1) == piece and lent[-1].last == first:
            lent[-1] = lent[-1]._replace(last=first + 1)
        else:
            lent.append(piece)
    return Draft(ids, tuple(lent), np.flatnonzero(source < 0), fixed)
