"""Snapshots out of pages, and back into the pages of a new row. See `octavo.kv.snapshot` for what they are."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.attention import Pages, slots
from octavo.attention.cpu import copies
from octavo.config import NEVER
from octavo.errors import CacheStateError
from octavo.kv.holes import ranked
from octavo.kv.plan import found
from octavo.kv.restoring import layout_of
from octavo.kv.snapshot import Ragged, Snapshot
from octavo.kv.tables import Index, Tables

AT_ONCE = 2**24  # slots that are searched in one operation, for each of which it holds some ten bytes


class Tail(NamedTuple):
    """One row's tail at a boundary, K places for each head: what is not `some` means nothing.

    On CUDA K is as much as there can be (`Tables.expiring`), since only the device knows how much there is; elsewhere
    it is what the fullest head needs.
    """

    position: Tensor  # [] int32, the boundary
    some: Tensor  # [L, H, K] bool
    content: list[Tensor]  # [L, H, K] or [L, H, K, D] each, as `octavo.attention.slots` gives it

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.some.nbytes + sum(t.nbytes for t in self.content)


class Passed(NamedTuple):
    """One row's tail at a boundary within a chunk (`octavo.kv.within`), with nothing that means nothing."""

    position: Tensor  # [] int32, the boundary
    part: Ragged

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.part.tensors.values())


class Boundaries:
    """Which boundaries of a batch are to be kept, and the tails that were taken at those that have been reached.

    `wanted` are columns, padding included, as `State.seen` counts; tails know their own row's position. Whatever
    changes the tails makes another one of these, which shares `wanted`, so that a batch can exchange it as a whole.
    """

    def __init__(
        self, wanted: set[int] | None = None, tails: dict[int, tuple[Tail | Passed, ...]] | None = None
    ) -> None:
        self.wanted = set() if wanted is None else wanted
        self._tails = tails or {}  # by row of the tables

    @property
    def nbytes(self) -> int:
        """Bytes of all tails."""
        return sum(tail.nbytes for each in self._tails.values() for tail in each)

    def of(self, row: int) -> tuple[Tail | Passed, ...]:
        """The tails of one row, in the order of their boundaries."""
        return self._tails.get(row, ())

    def reached(self, tables: Tables, rows: Sequence[int], index: Index, shift: int) -> "Boundaries":
        """With the tails of all rows where they are now. Asks nothing of the device."""
        new = {row: (*self.of(row), tail) for row, tail in zip(rows, capture(tables, index, shift), strict=True)}
        return Boundaries(self.wanted, self._tails | new)

    def passed(self, tails: Mapping[int, Sequence[Passed]]) -> "Boundaries":
        """With tails that were taken within a forward, by row."""
        return Boundaries(self.wanted, self._tails | {row: (*self.of(row), *new) for row, new in tails.items()})

    def followed(self, rows: Iterable[tuple[int, int]]) -> "Boundaries":
        """The same for a batch of other rows: (row there, row here)."""
        return Boundaries(self.wanted, {there: self._tails[here] for there, here in rows if here in self._tails})

    def fork(self, rows: Iterable[tuple[int, int]]) -> "Boundaries":
        """`followed` for a second batch, which may want other ones from then on."""
        return Boundaries(set(self.wanted), self.followed(rows)._tails)

    def joined(self, other: "Boundaries", ours: int, theirs: int) -> "Boundaries":
        """With another batch's, whose columns move by `theirs`, and one's own by `ours`."""
        return Boundaries(self.moved(ours).wanted | other.moved(theirs).wanted, self._tails | other._tails)

    def moved(self, columns: int) -> "Boundaries":
        """With columns that have moved, those before the first one left out."""
        if columns == 0:
            return self
        return Boundaries({p + columns for p in self.wanted if p + columns > 0}, self._tails)

    def cut(self, ends: dict[int, int]) -> "Boundaries":
        """Without what is past the end of rows that were cut: {row: tokens left}."""
        left = {row: tuple(tail for tail in self.of(row) if int(tail.position) <= end) for row, end in ends.items()}
        return Boundaries(self.wanted, self._tails | left)

    def without(self, row: int, positions: Collection[int]) -> "Boundaries":
        """Without a row's tails at some boundaries: what they were taken for is done."""
        left = tuple(tail for tail in self.of(row) if int(tail.position) not in positions)
        return Boundaries(self.wanted, self._tails | {row: left})

    def forgotten(self) -> "Boundaries":
        """Without tails: the rows are gone. What is wanted stays so."""
        return Boundaries(self.wanted)


def capture(tables: Tables, index: Index, shift: int) -> list[Tail]:
    """The tails of some rows where they are now, one each. Asks nothing of the device."""
    table, now = tables.table[index], tables.position[index].clone()
    B, L, H, M = table.shape
    step = max(1, AT_ONCE // max(1, B * H * M * tables.pool.layout.page_size))
    parts = [_searched(tables, index, slice(first, first + step), now, shift) for first in range(0, L, step)]
    some = torch.cat([part[0] for part in parts], 1)
    content = [torch.cat(each, 1) for each in zip(*(part[1] for part in parts), strict=True)]
    if some.is_cuda:  # how wide they must be is known there alone
        return [Tail(now[b], some[b], [each[b] for each in content]) for b in range(B)]
    widths = some.sum(-1).flatten(1).amax(-1).tolist()
    return [
        Tail(now[b], some[b, ..., :k].clone(), [each[b, :, :, :k].clone() for each in content])
        for b, k in enumerate(widths)
    ]


def _searched(tables: Tables, index: Index, layers: slice, now: Tensor, shift: int) -> tuple[Tensor, list[Tensor]]:
    """(`some`, `content`) of the tails of some layers, each with a leading dimension of rows."""
    pool, table, length = tables.pool, tables.table[index][:, layers], tables.length[index][:, layers]
    if not tables.expiring:  # so nothing needs to be searched
        table = table[..., :1]
    expiry = pool.pages.expiry[table].flatten(-2)  # [B, l, H, W]
    spots = torch.arange(expiry.shape[-1], device=expiry.device)
    wanted = (expiry >= now[:, None, None, None]) & (expiry < NEVER)
    if shift:
        wanted |= spots == tables.newest[index][:, layers, :, None]
    wanted &= spots < length[..., None]
    most = min(tables.expiring, expiry.shape[-1])
    order = wanted.cumsum(-1, dtype=torch.int32)
    slot = ranked(wanted, order, most)[..., :most]
    some = torch.arange(most, device=expiry.device) < order[..., -1:]
    return some, slots(pool.pages, *found(table, slot, some, pool.layout.page_size))


def snapshot_of(
    tables: Tables,
    row: int,
    tails: Sequence[Tail | Passed],
    boundaries: Sequence[int] | None,
    shift: int,
    identity: dict[str, Any],
    tokens: Tensor | None = None,
) -> Snapshot:
    """A row's snapshot at `boundaries`, by default at all that have a tail and at its end; on the device of its pages.

    Where nothing expires every position is a boundary; elsewhere `tails` must be known, but for the end. Raises
    CacheStateError where a boundary is not, or where nothing has been read.
    """
    pool = tables.pool
    with pool.lock:
        end = int(tables.position[row])
        if end == 0:
            raise CacheStateError("this sequence has read nothing that a snapshot could hold")
        known: dict[int, Tail | Passed] = {p: tail for tail in tails if (p := int(tail.position)) > 0}
        known[end] = capture(tables, slice(row, row + 1), shift)[0]
        chosen = tuple(sorted(known if boundaries is None else set(boundaries)))
        for p in chosen:
            if not 0 < p <= end or (tables.expiring and p not in known):
                raise CacheStateError(
                    f"boundary {p} was not kept; name it with `keep` before its tokens are read, or ask for one of "
                    f"{', '.join(map(str, sorted(known)))}"
                )
        if not chosen:
            raise CacheStateError("a snapshot needs at least one boundary")
        segments = _segments(tables, row, chosen, shift)
        ends = [trimmed(pool.pages, known.get(p, known[end])) for p in chosen]
    if tokens is not None:
        tokens = tokens.flatten().int().cpu()
        if len(tokens) < chosen[-1]:
            raise CacheStateError(f"{len(tokens)} token ids do not reach to boundary {chosen[-1]}")
    return Snapshot(chosen, tuple(segments), tuple(ends), layout_of(tables, shift), identity, tokens)


def _segments(tables: Tables, row: int, chosen: Sequence[int], shift: int) -> list[Ragged]:
    """The slots kept for ever of the tokens that were decided up to each boundary, from the one before on."""
    search = _kept(tables, row)
    return [_part(tables, row, *search, first - shift, last - shift) for first, last in pairwise((0, *chosen))]


def kept_and_tail(tables: Tables, row: int, first: int, shift: int) -> tuple[Ragged, Ragged]:
    """A row's slots that are kept for ever, of the decided positions from `first` on, and its tail where it is now.

    As `capture` and `trimmed` give the tail, but all slots are read once for both.
    """
    pages, end = tables.pool.pages, int(tables.position[row])
    newest = tables.newest[row].flatten() if shift else None
    if copies.suits(pages):
        kept = _copied(tables, row, (NEVER, NEVER), (first, end - shift), None, tail=False)
        return kept, _copied(tables, row, (end, NEVER - 1), (max(0, end - tables.expiring), end), newest, tail=True)
    table = tables.table[row]
    there, position, expiry = _read(pages, table, tables.length[row])
    wanted = expiry.ge(end).logical_and_(expiry < NEVER)
    if newest is not None:
        wanted |= torch.arange(position.shape[-1], device=position.device) == newest[:, None]
    kept = _part(tables, row, there & (expiry == NEVER), position, first, end - shift)
    return kept, _picked(pages, table, wanted & there, position, tail=True)


def expiring(tables: Tables, table: Tensor, length: Tensor, end: int) -> Ragged:
    """The slots of a row's layers, `table` [l, H, M] and `length` [l, H], that a query at position `end` still sees and
    a later one will not, as a tail."""
    pages = tables.pool.pages
    expires, seen = (end, NEVER - 1), (max(0, end - tables.expiring), end)
    if copies.suits(pages):
        return copied(pages, table, length, expires, seen, tail=True)
    there, position, expiry = _read(pages, table, length)
    wanted = there & (expiry >= end) & (expiry < NEVER) & (position >= seen[0]) & (position < end)
    return _picked(pages, table, wanted, position, tail=True)


def _copied(
    tables: Tables, row: int, expiry: tuple[int, int], position: tuple[int, int], newest: Tensor | None, *, tail: bool
) -> Ragged:
    """A row's slots whose expiry and position lie within bounds, and the `newest` [R]; see `copies.chosen`."""
    return copied(tables.pool.pages, tables.table[row], tables.length[row], expiry, position, newest, tail=tail)


def copied(
    pages: Pages, table: Tensor, length: Tensor, expiry: tuple[int, int], position: tuple[int, int],
    newest: Tensor | None = None, *, tail: bool,
) -> Ragged:  # fmt: skip
    """The same of some layers, `table` [l, H, M] and `length` [l, H]."""
    flat = table.flatten(0, 1)
    found = copies.chosen(pages, flat, length.flatten(), expiry, position, newest)
    return _ragged(pages, found[2].view(length.shape), copies.taken(pages, flat, *found), tail=tail)


def _kept(tables: Tables, row: int) -> tuple[Tensor, Tensor]:
    """(which slots of a row are kept for ever, the positions of all), both [heads of all layers, slots]."""
    there, position, expiry = _read(tables.pool.pages, tables.table[row], tables.length[row])
    return there & (expiry == NEVER), position


def _read(pages: Pages, table: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(whether there is one, position, expiry) of the slots in a table [l, H, M], [heads of all layers, slots] each."""
    table = table.flatten(0, 1)  # [l * H, M]
    position, expiry = pages.position[table].flatten(-2), pages.expiry[table].flatten(-2)  # [l * H, W]
    spots = torch.arange(position.shape[-1], device=position.device)
    return spots < length.flatten()[:, None], position, expiry


def _part(tables: Tables, row: int, kept: Tensor, position: Tensor, first: int, last: int) -> Ragged:
    """Of the slots that `_kept` has found, those at positions `first` up to, not including, `last`."""
    wanted = kept & (position >= first) & (position < last)
    return _picked(tables.pool.pages, tables.table[row], wanted, position, tail=False)


def _picked(pages: Pages, table: Tensor, wanted: Tensor, position: Tensor, *, tail: bool) -> Ragged:
    """The slots in a table [l, H, M] where `wanted`, as parts have them."""
    S = pages.position.shape[1]
    head, slot = _ordered(wanted, position)
    content = slots(pages, table.flatten(0, 1)[head, slot // S].long(), slot % S)
    return _ragged(pages, wanted.sum(-1).view(table.shape[:2]), content, tail=tail)


def trimmed(pages: Pages, tail: Tail | Passed) -> Ragged:
    """A tail without what is not there."""
    if isinstance(tail, Passed):
        return tail.part
    names = _names(pages)
    content = [each.flatten(0, 1) for each in tail.content]
    head, place = _ordered(tail.some.flatten(0, 1), content[names.index("position")])
    return _ragged(pages, tail.some.sum(-1), [each[head, place] for each in content], tail=True)


def _ordered(wanted: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """(head, place) of what is wanted, in the order of heads and positions; both arguments are [heads, places]."""
    head, place = wanted.nonzero().unbind(1)
    key = head * 2**31 + position[head, place]
    if bool((key.diff() > 0).all()):  # where nothing has been evicted they are
        return head, place
    order = key.argsort()
    return head[order], place[order]


def _names(pages: Pages) -> list[str]:
    """What `octavo.attention.slots` gives, by name."""
    return [name for name, part in pages._asdict().items() if part is not None]


def _ragged(pages: Pages, counts: Tensor, content: list[Tensor], *, tail: bool) -> Ragged:
    """Slots as `slots` gave them, codes in their own dtype again."""
    parts = dict(zip(_names(pages), content, strict=True))
    for name in ("key", "value"):
        parts[name] = parts[name].view(getattr(pages, name).dtype)
    if not tail:
        del parts["expiry"]
    return Ragged(counts.int(), **parts)
