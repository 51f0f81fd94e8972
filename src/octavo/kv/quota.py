"""What one cache may hold of the memory that all caches share."""

from collections.abc import Callable

from torch import Tensor

from octavo.errors import CacheBudgetError


class Quota:
    """Bounds the pages of one cache; `budget` bytes (None: no bound), `nbytes()` counts what it holds now.

    Counting asks the device, so it is done only where the bound could be reached.
    """

    def __init__(self, budget: int | None, nbytes: Callable[[], int], page_nbytes: int) -> None:
        self.budget = budget
        self._count = nbytes
        self._page_nbytes = page_nbytes
        self._nbytes: int | None = None  # an upper bound of what is held; None: unknown

    def claim(self, claim: int, need: Tensor) -> None:
        """Let `need` (int64 scalar on the device, at most `claim`) pages be taken, or raise CacheBudgetError."""
        if self.budget is None:
            return
        most = claim * self._page_nbytes
        if self._nbytes is None or self._nbytes + most > self.budget:
            self._nbytes, most = self._count(), int(need) * self._page_nbytes
            if self._nbytes + most > self.budget:
                raise CacheBudgetError(
                    f"the KV cache needs {self._nbytes + most:,} bytes and its budget is {self.budget:,}; "
                    "raise the budget, shorten the input or use an adapter that evicts more"
                )
        self._nbytes += most

    def forget(self) -> None:
        """Count anew at the next claim: pages have been given back."""
        self._nbytes = None
