"""Shift 1, as published DMS checkpoints have it: a token's mark is read at the next token.

So the mark of each sequence's newest token is open, and its slot must be known when the next token settles it.
"""

import torch
from torch import Tensor

from octavo.config import NEVER
from octavo.kv.rows import Rows


class OpenMarks:
    """The slot of each row's newest token, `slot` [L, B, H] int64 (-1: none), in the rows of one cache."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.slot = torch.full_like(rows.length, -1, dtype=torch.int64)
        self._before: list[tuple[Tensor, Tensor]] = []  # (where, expiry) that an open forward has overwritten

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.slot.numel() * self.slot.element_size()

    def settle(self, stores: slice, marked: Tensor, position: Tensor, expiry: Tensor) -> Tensor:
        """Settle the cached newest tokens of some stores with the first new mark, then move the marks by one.

        `marked` [l, B, H, N] bool, `position` [B, N] of the new tokens (-1 is padding), `expiry` [B] that a marked
        newest token gets. Returns the marks of the new tokens [l, B, H, N]; the newest one's is open, hence False.
        """
        real = position >= 0
        N = position.shape[1]
        columns = torch.arange(N, device=position.device).where(real, N)
        following = columns.flip(1).cummin(1).values.flip(1)  # the first real token at or after each column
        marks = torch.cat([marked, marked.new_zeros(*marked.shape[:3], 1)], 3)
        slot = self.slot[stores]
        doomed = marks.gather(3, _everywhere(following[:, :1], marked))[..., 0] & (slot >= 0)
        if self.rows.pool.pages:
            at = self.rows.at(slot.clamp(min=0)[..., None], stores).flatten()
            flat = self.rows.pool.expiry.view(-1)
            self._before.append((at, flat[at]))
            mortal = expiry.int()[None, :, None].expand_as(slot)
            flat[at] = torch.where(doomed.flatten(), mortal.flatten(), flat[at])
        later = torch.cat([following[:, 1:], torch.full_like(following[:, :1], N)], 1)
        return marks.gather(3, _everywhere(later, marked))

    def undo(self) -> None:
        """Open again what a forward that failed has settled."""
        for at, expiry in reversed(self._before):
            self.rows.pool.expiry.view(-1)[at] = expiry
        self._before = []

    def move(self, slot: Tensor, position: Tensor) -> None:
        """The new tokens lie in `slot` [L, B, H, N]: where a sequence has some, the last one's mark is open now."""
        newest = position.argmax(1)[None, :, None, None].expand(*slot.shape[:3], 1)
        some = (position >= 0).any(1)[None, :, None]
        self.slot = torch.where(some, slot.gather(3, newest)[..., 0], self.slot)
        self._before = []

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences at these indices."""
        self.slot = self.slot[:, sequences]

    def reopen(self, now: Tensor) -> None:
        """After a crop to `now` [B]: the newest token left was settled by a token that is gone; its mark is open."""
        rows = self.rows
        if rows.pool.pages == 0:
            return
        position = rows.pool.position[rows.table].flatten(3)  # [L, B, H, M*S]
        slots = torch.arange(position.shape[-1], device=now.device)
        newest = (position == (now - 1)[None, :, None, None]) & (slots < rows.length[..., None])
        slot = torch.where(newest, slots, -1).amax(-1)
        at = rows.at(slot.clamp(min=0)[..., None])[..., 0]
        rows.pool.expiry.view(-1)[at[slot >= 0]] = NEVER
        self.slot = slot


def _everywhere(column: Tensor, marked: Tensor) -> Tensor:
    """An index of columns [B, n] for all stores and heads of `marked`, [l, B, H, n]."""
    return column[None, :, None].expand(marked.shape[0], -1, marked.shape[2], -1)
