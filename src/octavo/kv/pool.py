"""The page pool: fixed-size pages of key/value slots, a free list, growth up to a byte budget.

A page holds `page_size` slots of one (sequence, layer, KV head); a slot is a key, a value, a position and an
expiry. Free page ids lie on a stack that is a tensor, so that taking pages needs no host; only `reserve`,
called once per forward, looks at the count. The pool grows by little more than what is asked for and gives
memory back on `repack`, because what it holds is what the user pays.
"""

import torch
from torch import Tensor

from octavo.errors import CacheBudgetError

GROWTH = 32  # spare room on growth: 1/32 of the pool, so that decoding rarely copies


class PagePool:
    """Pages `k`, `v` [P, S, D] and `position`, `expiry` [P, S] int32 on one device.

    `budget` bounds `nbytes` (bytes of all four and the free list); None is no bound. `dtype` is how slots are
    stored, which need not be what the model computes in.
    """

    def __init__(
        self, head_dim: int, dtype: torch.dtype, device: torch.device, page_size: int, budget: int | None
    ) -> None:
        self.page_size = page_size
        self.budget = budget
        self.k = torch.empty(0, page_size, head_dim, dtype=dtype, device=device)
        self.v = torch.empty(0, page_size, head_dim, dtype=dtype, device=device)
        self.position = torch.empty(0, page_size, dtype=torch.int32, device=device)
        self.expiry = torch.empty(0, page_size, dtype=torch.int32, device=device)
        self.free = torch.empty(0, dtype=torch.int32, device=device)  # [P] stack of free page ids
        self.free_count = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def pages(self) -> int:
        """Pages that exist, free or in use."""
        return self.k.shape[0]

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page, its positions, expiries and place on the free list included."""
        return self.page_size * (2 * self.k.shape[2] * self.k.element_size() + 8) + 4

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.pages * self.page_nbytes

    def reserve(self, count: int) -> None:
        """Make at least `count` pages free. Raises CacheBudgetError, with nothing changed, past the budget."""
        free = int(self.free_count)
        missing = count - free
        if missing <= 0:
            return
        self.check_budget(self.pages + missing)
        grow = max(missing, self.pages // GROWTH)
        if self.budget is not None:
            grow = min(grow, self.budget // self.page_nbytes - self.pages)
        first = self.pages
        self._resize(first + grow)
        # Descending, so that the top of the stack hands out ascending ids.
        self.free[free : free + grow] = torch.arange(
            first + grow - 1, first - 1, -1, dtype=torch.int32, device=self.free.device
        )
        self.free_count += grow

    def check_budget(self, pages: int) -> None:
        """Raise CacheBudgetError when `pages` pages are more than the budget holds."""
        if self.budget is not None and pages * self.page_nbytes > self.budget:
            raise CacheBudgetError(
                f"the KV cache needs {pages * self.page_nbytes:,} bytes and its budget is {self.budget:,}; "
                "raise the budget, shorten the input or use an adapter that evicts more"
            )

    def peek(self, rank: Tensor) -> Tensor:
        """Ids of free pages by rank from the top of the stack (int64, any shape); ranks past the end give some id."""
        return self.free[(self.free_count - 1 - rank).clamp(min=0)]

    def take(self, total: Tensor) -> None:
        """Remove `total` (int64 scalar on the device) pages from the top of the stack."""
        self.free_count -= total

    def give(self, ids: Tensor) -> None:
        """Put pages back on the free list (`ids` int32 [n])."""
        count = int(self.free_count)
        self.free[count : count + len(ids)] = ids
        self.free_count += len(ids)

    def repack(self, page_table: Tensor, used: Tensor) -> Tensor:
        """Keep exactly the pages that `page_table` [..., M] names where `used` [..., M] bool, and free the rest.

        A page named twice becomes two. Returns the table with the new ids. Raises CacheBudgetError with
        nothing changed.
        """
        keep = page_table[used].long()
        self.check_budget(len(keep))
        for name in ("k", "v", "position", "expiry"):
            setattr(self, name, getattr(self, name)[keep])
        self.free = torch.empty(len(keep), dtype=torch.int32, device=self.free.device)
        self.free_count.zero_()
        table = torch.zeros_like(page_table)
        table[used] = torch.arange(len(keep), dtype=torch.int32, device=table.device)
        return table

    def _resize(self, pages: int) -> None:
        for name in ("k", "v", "position", "expiry", "free"):
            old: Tensor = getattr(self, name)
            new = torch.empty(pages, *old.shape[1:], dtype=old.dtype, device=old.device)
            new[: len(old)] = old
            setattr(self, name, new)
