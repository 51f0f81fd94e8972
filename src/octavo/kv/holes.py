"""Slots that are free: those of expired tokens, which the next ones take over.

On the CPU they are searched in C, row by row; elsewhere all rows are as long as the longest one, and of fixed shapes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.attention import Pages
from octavo.attention.cpu import copies


class Holes(NamedTuple):
    """Slots of rows that are free, K at most of each, in the order of slots."""

    slot: Tensor  # [..., K] int64; it means nothing past `total`
    expiry: Tensor  # [..., K] int32, likewise
    total: Tensor  # [...] int64, free slots of each row, which may be more than K

    def first(self, n: Tensor) -> Tensor:
        """Which of the K are among the first n [...] of their row, bool [..., K]."""
        return torch.arange(self.slot.shape[-1], device=n.device) < torch.minimum(n, self.total)[..., None]


def holes_in(pages: Pages, table: Tensor, length: Tensor, limit: Tensor, most: int) -> Holes:
    """The slots with expiry < `limit` ([B, ...] int32, one for each sequence) of rows with pages `table` [B, ..., M].

    Of each row the first `most` at least, as far as there are so many. `length` [B, ...] int32: slots in use.
    """
    if not copies.suits(pages):
        expiry = pages.expiry[table].flatten(-2)
        return holes(expiry, length, limit.view(-1, *[1] * length.ndim), most)
    rows = length.shape
    each = limit.view(-1, *[1] * (length.ndim - 1)).expand(rows).contiguous()
    found = copies.expired(pages, table.reshape(-1, table.shape[-1]), length.flatten(), each.flatten(), most)
    return Holes(*(t.view(*rows, *t.shape[1:]) for t in found))


def holes(expiry: Tensor, length: Tensor, limit: Tensor, most: int) -> Holes:
    """The first `most` slots with expiry < `limit` [..., 1] int32 of rows with these expiries.

    `expiry` [..., W] int32 of all slots of the rows, without meaning at and past `length` [...] int32.
    """
    slots = torch.arange(expiry.shape[-1], device=expiry.device)
    free = (slots < length[..., None]) & (expiry < limit)
    order = free.cumsum(-1, dtype=torch.int32)
    slot = ranked(free, order, most)[..., :most]
    return Holes(slot, expiry.gather(-1, slot), order[..., -1].long())


def ranked(chosen: Tensor, order: Tensor, most: int) -> Tensor:
    """Indices of the first `most` chosen (bool [..., W], `order` its cumsum): int64 [..., most + 1].

    What is past the last chosen is 0; the last column is spill.
    """
    slots = torch.arange(chosen.shape[-1], device=chosen.device)
    at = torch.where(chosen & (order <= most), order - 1, most).long()
    return at.new_zeros(*chosen.shape[:-1], most + 1).scatter_(-1, at, slots.expand_as(at))
