"""How many pages are in use, as far as the host knows without waiting for the device, and how many are promised."""

import weakref
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.kv.late import Late


class Promised(Protocol):
    """Somebody who may take so many pages at any moment without asking, as a CUDA graph does."""

    @property
    def promised(self) -> int: ...


class _InUse(NamedTuple):
    """How many pages were in use when `claimed` had been claimed."""

    pages: int
    claimed: int


class Demand:
    """An upper bound of the pages in use: a true count, which comes late, and all that was claimed since then.

    `claimed`: pages that steps may have taken, added up for ever. `promises`: who may take pages without claiming them.
    """

    def __init__(self, device: torch.device) -> None:
        self.claimed = 0
        self.promises: weakref.WeakSet[Promised] = weakref.WeakSet()
        self._late = Late(device)
        self._in_use = _InUse(0, 0)
        self._given_back = False  # whether pages were given back since the last question
        self._judged = True  # whether `shrinks` has seen all answers that are younger than pages given back

    @property
    def promised(self) -> int:
        """Pages that may be taken without being claimed."""
        return sum(each.promised for each in self.promises)

    @property
    def most(self) -> int:
        """No more pages are in use."""
        self._read()
        return self._in_use.pages + self.claimed - self._in_use.claimed

    def ask(self, free: Tensor, size: int) -> None:
        """Begin to read how many of `size` pages are free (an int64 scalar on the device)."""
        self._late.post(free, (size, self.claimed, self._given_back))
        self._given_back = False

    def know(self, pages: int) -> None:
        """So many pages are in use now; answers that are still to come mean nothing."""
        self._late.forget()
        self._in_use, self._judged = _InUse(pages, self.claimed), False

    def given_back(self) -> None:
        """Pages are given back just now."""
        self._given_back = True

    def fell(self) -> bool:
        """Whether since the last call pages may have been given back and the count after that has come."""
        self._read()
        judged, self._judged = self._judged, True
        return not judged

    def _read(self) -> None:
        for free, (size, claimed, given_back) in self._late.poll():
            self._in_use = _InUse(size - free, claimed)
            self._judged = self._judged and not given_back
