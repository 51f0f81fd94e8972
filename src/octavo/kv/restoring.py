"""From slots that are kept apart to the pages of a new row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention import Pages, put
from octavo.attention.cpu import copies
from octavo.attention.pages import CODES
from octavo.config import NEVER
from octavo.errors import CacheStateError
from octavo.kv.plan import extended
from octavo.kv.pool import pages_for
from octavo.kv.ragged import picked, take
from octavo.kv.snapshot import Ragged, SnapshotLayout, counted
from octavo.kv.tables import Tables


class Stretch(NamedTuple):
    """Slots of a part that follow each other in every head: nothing is copied until pages are filled.

    `first` [R] int64 and `counts` [L, H] int32: where they begin in the part, and how many they are. `window`: they are
    marked, and expire so long after their position; None: their expiry is the part's.
    """

    part: Ragged
    first: Tensor
    counts: Tensor
    window: int | None = None

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """(head, place among the head's slots, index in the part) of each slot, int64 [n]."""
        n = self.counts.flatten().long()
        head = torch.arange(len(n), device=n.device).repeat_interleave(n)
        place = torch.arange(len(head), device=n.device) - (n.cumsum(0) - n)[head]
        return head, place, self.first[head] + place

    def alone(self) -> Ragged:
        """The slots as a part of their own, with their expiries; the same tensors where they are all of it."""
        part = self.part
        if int(self.counts.sum()) < len(part.position):
            part = picked(part, self.places()[2], self.counts)
        return self._expiring(part)

    def on(self, device: torch.device) -> Ragged:
        """`alone` on another device. Where they are most of the part all of it is sent and then cut, since a host cuts
        more slowly than it sends."""
        part, n = self.part, int(self.counts.sum())
        if 2 * n < len(part.position) or n == len(part.position):
            return Ragged(**{name: t.to(device) for name, t in self.alone().tensors.items()})
        counts = self.counts.to(device)
        index = Stretch(part, self.first.to(device), counts).places()[2]
        cut = {name: take(t.to(device), index) for name, t in part.tensors.items() if name != "counts"}  # one by one
        return self._expiring(Ragged(counts, **cut))

    def _expiring(self, part: Ragged) -> Ragged:
        """These slots with the expiries that they have here."""
        return part if self.window is None else part._replace(expiry=part.position + self.window)


def whole(part: Ragged) -> Stretch:
    """All slots of a part."""
    n = part.counts.flatten().long()
    return Stretch(part, n.cumsum(0) - n, part.counts)


def stretch(part: Ragged, first: int, last: int, window: int | None = None) -> Stretch:
    """The slots at positions `first` up to, not including, `last`, which rise in every head."""
    n = part.counts.flatten().long()
    ends = F.pad(n.cumsum(0), (1, 0))
    begin, end = (_before(part.position, p, ends) for p in (first, last))
    counts = (end - begin).view(part.counts.shape).int()
    return Stretch(part, ends[:-1] + begin, counts, window)


def _before(position: Tensor, bound: int, ends: Tensor) -> Tensor:
    """How many slots of each head have a position below `bound`, int64 [R]."""
    below = F.pad((position < bound).cumsum(0), (1, 0))
    return below[ends[1:]] - below[ends[:-1]]


def layout_of(tables: Tables, shift: int) -> SnapshotLayout:
    """What the rows of these tables look like."""
    layout = tables.pool.layout
    layers, heads = tables.length.shape[1:]
    return SnapshotLayout(layers, heads, layout.head_dim, layout.dtype, tables.window, shift)


def restore_into(
    tables: Tables, row: int, layout: SnapshotLayout, parts: Sequence[Ragged | Stretch], boundary: int
) -> None:
    """Make an empty row what its sequence was at a boundary, to the bit; another order of slots aside.

    `parts` together are all slots that were seen there, as `Snapshot.at` gives them: with shift 1 the last one has the
    newest token of every head. Raises CacheStateError for another layout, and CacheBudgetError. Part of a change
    (`pool.Changing`): a row that nobody has in the end is vacant again.
    """
    pool, S = tables.pool, tables.pool.layout.page_size
    ours = layout_of(tables, layout.shift)
    if layout != ours:
        raise CacheStateError(f"this snapshot is of a cache of {layout}, not of {ours}")
    stretches = [part if isinstance(part, Stretch) else whole(part) for part in parts]
    if not copies.suits(pool.pages):
        stretches = [whole(part.on(pool.device)) for part in stretches]
    counts = counted(stretches).to(pool.device)
    with pool.lock:
        most = int(counts.max())
        tables.widen(most)
        need = int(pages_for(counts, S).sum())
        pool.reserve(need, need)
        table = extended(pool, tables.table[row], torch.zeros_like(counts), counts, most)
        tables.table[row], tables.length[row] = table, counts
        filled = torch.zeros(counts.numel(), dtype=torch.int64, device=pool.device)
        for part in stretches:
            fill(pool.pages, table.flatten(0, 1), filled, part)
            if part.window is not None or part.part.expiry is not None:
                _note_tail(tables, row, filled, part, boundary if layout.shift else None)
            filled = filled + part.counts.flatten()
        tables.position[row] = boundary
        tables.lost[row] = torch.where(counts < boundary, boundary - 1, -1).int()


def fill(pages: Pages, table: Tensor, filled: Tensor, part: Stretch) -> None:
    """Store a stretch in the pages of a table [R, M], behind the slots that are `filled` [R] int64 of each row."""
    if copies.suits(pages):
        tensors = part.part.tensors
        stored = [tensors.get(name) for name in Pages._fields]
        if part.window is not None:
            stored[-1] = None
        copies.fill(pages, table, filled, stored, part.first, part.counts.flatten().long(), part.window)
        return
    alone, S = part.alone(), pages.key.shape[1]
    head, place, _ = part.places()
    slot = filled[head] + place
    put(pages, table[head, slot // S].long(), slot % S, _content(alone))


def _note_tail(tables: Tables, row: int, filled: Tensor, part: Stretch, boundary: int | None) -> None:
    """Tell the tables where the marked slots of a part are, and with a `boundary` where each head's newest token is."""
    head, place, index = part.places()
    position, slot = part.part.position[index], (filled[head] + place).int()
    if part.window is None:
        assert part.part.expiry is not None
        expiry = part.part.expiry[index]
    else:
        expiry = position + part.window
    if boundary is not None:
        last = position == boundary - 1
        tables.newest[row].view(-1)[head[last]] = slot[last]
    if tables.window is not None:
        where = tables.place_of(position, expiry < NEVER)
        marks = tables.marks[row].flatten(0, 1)
        marks[head, where] = slot
        marks[:, -1] = -1  # the last place takes what nobody reads


def _content(part: Ragged) -> list[Tensor]:
    """Slots as `put` takes them."""
    expiry = torch.full_like(part.position, NEVER) if part.expiry is None else part.expiry
    parts = part._replace(expiry=expiry).tensors
    named = [parts[name] for name in Pages._fields if name in parts]
    return [t.view(torch.uint8) if t.dtype in CODES else t for t in named]
