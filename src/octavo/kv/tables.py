"""Where every sequence's slots lie: one row of fixed-width device tensors per sequence.

Rows join, fork and leave one at a time; a batch is a list of rows. Nothing of another row is touched. Tensors that grow
are made anew, and `generation` says so: a CUDA graph that was captured before must be captured again.
"""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.config import NEVER
from octavo.kv.pool import NOWHERE, PagePool, pages_for

WIDER = 8  # page tables grow by this many columns

Index = slice | Tensor  # what selects rows


class Holder(Protocol):
    """Whoever has rows of tables: a batch of sequences."""

    @property
    def rows(self) -> Sequence[int]: ...


class Tables:
    """Rows of sequences over one pool, L sets of keys and values (one per layer, or per group that shares them) each.

    `position` [R] int32: tokens read, so the next token's position. `table` [R, L, H, M] int32: page ids. `length`
    [R, L, H] int32: slots in use. `lost` [R, L, H] int32: the latest expiry among forgotten tokens (-1: none); a
    sequence can go back to any position past it. `newest` [R, L, H] int32: slot of the newest token (-1: none), kept
    where its mark is still open (`Eviction.shift` 1).

    `marks` [R, L, H, ring + 1] int32, where there is a `window`: at place p % ring the slot of the marked token at
    position p, -1 where it is not marked. A marked token of position p is visible up to p + window, and its slot comes
    free `undo` tokens later (see `Held`), so the query at q = p + window + 1 + undo finds that slot without a search.
    The ring has window + 1 places and as many more as any batch wants to go back (`reach_back`). The last place takes
    what nobody reads. Where layers have windows of their own (`longest` tokens), too many tokens expire for that:
    `window` is None, there are no marks, and steps search. `expiring`: slots of a row that can expire at most.

    `holders`: who has rows, and whether its owner is still there. Rows that nobody has are vacant as soon as somebody
    looks (`vacate`), so an interrupted operation cannot lose any.
    """

    def __init__(self, pool: PagePool, layers: int, kv_heads: int, window: int | None, longest: int = 0) -> None:
        self.pool = pool
        self.expiring = max(longest, 0 if window is None else window + 1)
        self.window = window = None if longest else window
        self.generation = 0
        self.holders: dict[int, tuple[weakref.ref[object], Holder]] = {}  # by id of the holder
        self._vacant: list[int] = []
        self._back = 0  # how many tokens `marks` reaches back beyond the window
        device = pool.device
        self.position = torch.zeros(0, dtype=torch.int32, device=device)
        self.length = torch.zeros(0, layers, kv_heads, dtype=torch.int32, device=device)
        self.lost, self.newest = torch.zeros_like(self.length), torch.zeros_like(self.length)
        self.table = torch.zeros(0, layers, kv_heads, WIDER, dtype=torch.int32, device=device)
        self.marks = self.table.new_zeros(0, layers, kv_heads, 0 if window is None else window + 2)
        self.flags = torch.arange(2, dtype=torch.int32, device=device)  # no and yes, where a kernel asks
        pool.tables.add(self)

    @property
    def _rows(self) -> dict[str, Tensor]:
        """What makes up the rows, by name."""
        return {name: getattr(self, name) for name in ("position", "length", "lost", "newest", "table", "marks")}

    @property
    def ring(self) -> int:
        """Positions that `marks` knows."""
        assert self.window is not None
        return self.window + 1 + self._back

    @property
    def row_nbytes(self) -> int:
        """Bytes of one sequence's row."""
        return sum(t[:1].numel() * t.element_size() for t in self._rows.values()) if len(self.position) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, taken or vacant."""
        return len(self.position) * self.row_nbytes

    def pages_of(self, rows: Sequence[int]) -> int:
        """Pages that some rows name, each counted once. Waits for the device."""
        if not rows:
            return 0
        index = self.index(rows)
        pages: Tensor = self.table[index][self.used(self.length[index])].unique()  # type: ignore[no-untyped-call]
        return len(pages)

    def nbytes_of(self, rows: Sequence[int]) -> int:
        """Bytes of the pages that some rows name, each counted once, and of the rows."""
        return self.pages_of(rows) * self.pool.page_nbytes + len(rows) * self.row_nbytes

    @property
    def taken(self) -> int:
        """Sequences held."""
        return len(self.position) - len(self._vacant)

    def join(self, count: int) -> list[int]:
        """Rows for new sequences, empty."""
        with self.pool.lock:
            missing = count - len(self._vacant)
            if missing > 0:
                self._grow(max(missing, len(self.position) // 2))
            vacant = sorted(self._vacant)
            rows, index = vacant[:count], self.index(vacant[:count])
            self.position[index] = 0
            self.length[index] = 0
            self.table[index] = NOWHERE
            for each in (self.lost, self.newest, self.marks):
                each[index] = -1
            self._vacant = vacant[count:]
        return rows

    def _grow(self, count: int) -> None:
        """Add so many vacant rows."""
        had = len(self.position)
        grown = {name: old.new_zeros(had + count, *old.shape[1:]) for name, old in self._rows.items()}
        for name, old in self._rows.items():
            grown[name][:had] = old
        self._replace(grown, vacant=[*self._vacant, *range(had, had + count)])

    def _replace(self, tensors: dict[str, Tensor], vacant: list[int]) -> None:
        """Exchange tensors of the rows, all of them or none, wherever an interrupt may fall."""
        self.__dict__.update(tensors, _vacant=vacant, generation=self.generation + 1)

    def leave(self, rows: Sequence[int]) -> None:
        """Give back the pages of sequences that ended, and their rows."""
        with self.pool.lock:
            for row in set(rows).difference(self._vacant):
                self.pool.drop(self.table[row].long(), self.used(self.length[row]))
                self.length[row] = 0
                self._vacant.append(row)
            self.pool.post()

    def fork(self, row: int) -> int:
        """A second sequence that shares all pages of one; either copies a page when it first writes into it."""
        with self.pool.lock:
            (twin,) = self.join(1)
            self.pool.share(self.table[row].long(), self.used(self.length[row]))
            for each in self._rows.values():
                each[twin] = each[row]
        return twin

    def vacate(self) -> None:
        """Make vacant what nobody has: rows of batches that are gone, and of operations that were interrupted."""
        holders = self.holders.items()
        self.holders = {key: (owner, holder) for key, (owner, holder) in holders if owner() is not None}
        taken = {row for _, holder in self.holders.values() for row in holder.rows}
        self._vacant = [row for row in range(len(self.position)) if row not in taken]

    def trim(self) -> None:
        """Give the rows' memory back where none is taken."""
        if len(self.position) and not self.taken:
            empty = {name: old.new_zeros(0, *old.shape[1:]) for name, old in self._rows.items()}
            empty["table"] = empty["table"].new_zeros(*empty["table"].shape[:-1], WIDER)
            self._replace(empty, vacant=[])

    def index(self, rows: Sequence[int]) -> "Index":
        """What selects these rows from the tensors: a slice where they lie in order, for views instead of copies."""
        first = rows[0] if rows else 0
        if list(rows) == list(range(first, first + len(rows))):
            return slice(first, first + len(rows))
        return torch.tensor(rows, dtype=torch.int64).to(self.table.device)

    def used(self, length: Tensor, width: int | None = None) -> Tensor:
        """Which table columns hold pages of rows with these lengths [...]: [..., M] bool."""
        columns = torch.arange(self.table.shape[3] if width is None else width, device=length.device)
        return columns * self.pool.layout.page_size < length[..., None]

    def widen(self, slots: int) -> None:
        """Make room for so many slots in every row."""
        columns, had = pages_for(slots, self.pool.layout.page_size), self.table.shape[3]
        if columns <= had:
            return
        columns = -(-max(columns, had * 9 // 8) // WIDER) * WIDER
        table = self.table.new_zeros(*self.table.shape[:3], columns)
        table[..., :had] = self.table
        self._replace({"table": table}, vacant=self._vacant)

    def reach_back(self, tokens: int) -> None:
        """Let `marks` of all rows know so many tokens beyond the window, for batches that want to go back."""
        if self.window is None or tokens <= self._back:
            return
        before, self._back = self._back, tokens
        try:
            marks = self._marks_of(slice(0, len(self.position)), self.position)
        except BaseException:
            self._back = before
            raise
        self._replace({"marks": marks}, vacant=self._vacant)

    def visible(self, index: slice | Tensor) -> Tensor:
        """Slots that the next query of some rows can see, int64 [B, L, H]."""
        expiry = self.pool.pages.expiry[self.table[index]].flatten(-2)
        used = torch.arange(expiry.shape[-1], device=expiry.device) < self.length[index][..., None]
        return (used & (expiry >= self.position[index][:, None, None, None])).sum(-1)

    def place_of(self, position: Tensor, real: Tensor) -> Tensor:
        """Where `marks` keeps tokens at `position` [...] int32: int64 [...], the last place where not `real` (bool)."""
        return torch.where(real, position % self.ring, self.ring).long()

    def note_marks(
        self, rows: Index | tuple[Index, slice | int], position: Tensor, real: Tensor, slot: Tensor, marked: Tensor
    ) -> None:
        """Tell `marks` of some rows (and layers) which of their tokens at `position` are `marked`, and in which slot.

        `slot` int64 and `marked` bool [..., N]; `position` int32 and `real` bool, which says where there is a token at
        all, are broadcast to them.
        """
        place = self.place_of(position, real).expand(slot.shape)
        marks = self.marks[rows]
        marks.scatter_(-1, place, torch.where(marked, slot, -1).int())
        if isinstance(rows[0] if isinstance(rows, tuple) else rows, Tensor):  # then `marks` was a copy
            self.marks[rows] = marks

    def find_marks(self, index: slice | Tensor, now: Tensor) -> None:
        """Make `marks` of some rows anew from their pages, as of position `now` [B] int32."""
        if self.window is not None:
            self.marks[index] = self._marks_of(index, now)

    def _marks_of(self, index: slice | Tensor, now: Tensor) -> Tensor:
        S = self.pool.layout.page_size
        table, length = self.table[index], self.length[index]
        expiry = self.pool.pages.expiry[table].flatten(-2)  # [B, L, H, W]
        slots = torch.arange(table.shape[-1] * S, dtype=torch.int32, device=now.device)
        recent = (expiry < NEVER) & (expiry >= now[:, None, None, None] - 1 - self._back)
        *row, slot = (recent & (slots < length[..., None])).nonzero().unbind(1)  # few of many
        position = self.pool.pages.position[table[(*row, slot // S)].long(), slot % S]
        marks = length.new_full((*length.shape, self.ring + 1), -1)
        marks[(*row, self.place_of(position, position >= 0))] = slot.int()
        return marks

    def held(self) -> Tensor:
        """Ids of the pages that the rows name, int64 [n], once for each row that does."""
        rows = torch.ones(len(self.position), dtype=torch.bool)
        rows[self._vacant] = False
        rows = rows.to(self.table.device)[:, None, None, None]
        return self.table[self.used(self.length) & rows].long()
