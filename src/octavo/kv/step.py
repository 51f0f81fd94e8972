"""What all forwards on pages share: the batch that runs them, and the positions of their new tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, SupportsInt

import torch
from torch import Tensor

from octavo.config import NEVER, Eviction
from octavo.kv.late import capturing
from octavo.kv.lifetimes import Lifetimes
from octavo.kv.newest import stored_before
from octavo.kv.pool import pages_for
from octavo.kv.quota import Quota
from octavo.kv.tables import Index, Tables


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, and what the host knows of them without asking the device."""

    tables: Tables
    index: Index  # which rows of the tables
    eviction: Eviction | None
    longest: int  # no row has more slots
    expired: bool  # whether any slot can have expired
    scattered: bool  # see `State`
    shared: bool  # see `State`
    quota: Quota
    claims: bool = True  # whether the step's pages are still to be reserved
    lifetimes: Lifetimes | None = None  # None: no token expires that no gate has marked
    undo: int = 0  # see `Held`

    @property
    def window(self) -> int:
        """Tokens for which a marked one stays visible."""
        return self.eviction.window if self.eviction else 0

    @property
    def shift(self) -> int:
        """See `Eviction`."""
        return self.eviction.shift if self.eviction else 0

    def free_before(self, query: Tensor) -> Tensor:
        """Slots with an expiry below it may be taken once no query before `query` (int32, any shape) is to come: those
        that nobody can see any more, `undo` tokens later. A slot whose token was taken back has -1 and is free at once.
        """
        return (query - self.undo).clamp(min=0)

    def sees_all(self, layer: int, tokens: int) -> bool:
        """Whether so many first tokens of a sequence all see those before them, whatever gates say."""
        life = self.lifetimes.each[layer] if self.lifetimes else None
        gated = self.eviction is None or tokens <= self.window + 1
        return gated and (life is None or tokens <= life.length)

    def expiry(self, position: Tensor, marked: Tensor | None, layers: slice) -> Tensor:
        """When tokens of some layers at `position` [B, N] expire, int32 [B, l, H or 1, N]: by their mark ([B, l, H, N]
        bool, None: none is marked) or by their layer's window, whichever comes first."""
        own = None if self.lifetimes is None else self.lifetimes.expiry(position, layers)
        if marked is None:
            return torch.full_like(position, NEVER)[:, None, None] if own is None else own
        gated = torch.where(marked, position[:, None, None] + self.window, NEVER).int()
        return gated if own is None else torch.minimum(gated, own)

    @property
    def columns(self) -> int:
        """Table columns that may name pages; at least one, since kernels take no empty table."""
        return max(1, pages_for(self.longest, self.tables.pool.layout.page_size))

    def reserve(self, claim: int, need: SupportsInt, wait: bool = True) -> None:
        """See `PagePool.reserve`; within the quota of these sequences. A captured step has reserved before."""
        if self.claims and not capturing(self.tables.pool.device):
            self.quota.claim(claim, need)
            self.tables.pool.reserve(claim, need, wait)


class Later:
    """A number on the device that is computed only where somebody asks, who waits for it."""

    def __init__(self, count: Callable[[], Tensor]) -> None:
        self._count = count

    def __int__(self) -> int:
        return int(self._count())


class New(NamedTuple):
    """The new tokens of one forward."""

    position: Tensor  # [B, N] int32, -1 is padding
    at: Tensor  # [B, N] int32, where their queries stand: padding's at the last token before it, -1 where none is
    start: Tensor  # [B] int32, position of the first
    after: Tensor  # [B] int32, position of the next query after this forward
    padded: bool  # whether any may be padding


class OnPages:
    """What every forward on pages says of its new tokens, and of those before them."""

    batch: Batch
    new: New

    @property
    def lines(self) -> Index:
        """Which rows of the tables its sequences have."""
        return self.batch.index

    @property
    def valid(self) -> Tensor | None:
        """Which of the new tokens are no padding, [B, N] bool; None: all."""
        return self.new.position >= 0 if self.new.padded else None

    def newest(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is stored in one layer of the token before each sequence's first new one, each [B, H, D] in `dtype`."""
        return stored_before(self.batch.tables, self.lines, layer, self.new.start, self.batch.shift, dtype)


def counted(start: Tensor, columns: int, valid: Tensor | None) -> New:
    """Positions of `columns` new tokens per sequence; `valid` [B, N] bool marks the real ones, None: all are."""
    if valid is None:
        ahead = torch.arange(columns, device=start.device, dtype=torch.int32)
        position = start[:, None] + ahead
        return New(position, position, start, start + columns, False)
    at = start[:, None] + valid.cumsum(1, dtype=torch.int32) - 1
    return New(at.masked_fill(~valid, -1), at, start, at[:, -1] + 1, True)


def newest_slot(slot: Tensor, position: Tensor, before: Tensor) -> Tensor:
    """The slot of each row's newest token after tokens at `position` [B, N] went to `slot` [B, ..., N]; int32 [B, ...].

    `before` [B, ...] int32 is what it was, and stays where a row has padding only.
    """
    ahead = (1,) * (slot.ndim - 2)
    last = position.argmax(1).view(-1, *ahead, 1).expand(*slot.shape[:-1], 1)
    some = (position >= 0).any(1).view(-1, *ahead)
    return torch.where(some, slot.gather(-1, last)[..., 0].int(), before)
