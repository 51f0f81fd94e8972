"""A sequence that is put together from slots of any positions, and forwards over the tokens that lie between them.

The visibility rule needs no order: a query at position q sees a slot iff position <= q <= expiry, whether the slot was
filled before or after the query's own. So what is missing in a sequence can be computed in place.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.kv.memory import bookkeeping
from octavo.kv.sequences import Sequences
from octavo.kv.step import New

if TYPE_CHECKING:
    from octavo.kv.hf_cache import PagedCache


def begin_between(cache: "PagedCache", position: Tensor, after: int) -> None:
    """Open a forward of tokens at these positions (int32 [N], rising) of a cache's one sequence, which holds others.

    `after`: the position of the next query, above all of these. `commit` ends it; where it fails the cache must be
    reset. Raises CacheBudgetError.
    """
    step = cache.begin(1, len(position), None, trains=True)  # a step of any length that no kernel cuts into spans
    row = position[None].to(cache.shape.device)
    step.new = New(row, row, row[:, 0], torch.full_like(row[:, 0], after), False)


@bookkeeping
def complete(sequences: Sequences) -> None:
    """Take note that nothing is missing any more: where marked slots are, and that what was evicted is lost."""
    sequences.settle()
    tables, index = sequences.tables, sequences.index
    with tables.pool.lock:
        now = tables.position[index]
        tables.find_marks(index, now)
        newest = (now - 1)[:, None, None].expand_as(tables.lost[index])
        tables.lost[index] = torch.where(tables.length[index] < now[:, None, None], newest, -1).int()
