"""What one cache may hold of the memory that all caches share."""

from collections.abc import Sequence
from typing import SupportsInt

from octavo.errors import CacheBudgetError, ConfigError
from octavo.kv.state import Holding
from octavo.kv.tables import Tables


class Quota:
    """Bounds the bytes of one cache: the pages of its rows, the rows, and what it keeps beside. None: no bound.

    Pages are counted on the device, so that is done only where the bound could be reached. A page that is to be copied
    because another cache names it too counts as one more until the next count.
    """

    def __init__(self, budget: int | None, tables: Tables, holding: Holding) -> None:
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ConfigError(f"a cache's budget must be a whole number of bytes, at least 1, or None, not {budget!r}")
        self.budget = budget
        self._tables, self._holding = tables, holding
        self._pages: int | None = None  # no more are held; None: unknown

    def claim(self, claim: int, need: SupportsInt, rows: Sequence[int] | None = None) -> None:
        """Let `need`, at most `claim`, pages be taken for the cache's rows, or raise CacheBudgetError."""
        if self.budget is None or claim == 0:  # what takes no page is never refused, as taking tokens back must not be
            return
        pages, rows = self._pages, self._holding.rows if rows is None else rows
        if pages is None or self._nbytes(pages + claim, rows) > self.budget:
            pages, claim = self._tables.pages_of(rows), int(need)
            self._check(pages + claim, rows)
        self._pages = pages + claim

    def admit(self, rows: Sequence[int]) -> None:
        """Raise CacheBudgetError where the cache could not hold these rows as they are. Waits for the device."""
        if self.budget is not None:
            self._check(self._tables.pages_of(rows), rows)

    def forget(self) -> None:
        """Count anew at the next claim: pages have been given back, or rows have come."""
        self._pages = None

    def _nbytes(self, pages: int, rows: Sequence[int]) -> int:
        tables = self._tables
        return pages * tables.pool.page_nbytes + len(rows) * tables.row_nbytes + self._holding.nbytes

    def _check(self, pages: int, rows: Sequence[int]) -> None:
        nbytes = self._nbytes(pages, rows)
        if self.budget is not None and nbytes > self.budget:
            raise CacheBudgetError(
                f"the KV cache needs {nbytes:,} bytes and its budget is {self.budget:,}; "
                "raise the budget, shorten the input or use an adapter that evicts more"
            )
