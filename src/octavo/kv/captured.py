"""Decode steps captured in a CUDA graph: they take pages without asking, so these are promised to them beforehand."""

from dataclasses import replace

from torch import Tensor

from octavo.errors import CacheStateError
from octavo.kv.plan import named_elsewhere
from octavo.kv.pool import pages_for
from octavo.kv.quota import Quota
from octavo.kv.state import Promise, State
from octavo.kv.tables import Index, Tables


def promised(tables: Tables, index: Index, state: State, tokens: int, quota: Quota) -> State:
    """The state with room for so many more tokens of each sequence. Waits for the device; raises CacheBudgetError.

    Part of a change (`pool.Changing`); what was promised before must be given up.
    """
    pool, S, lengths = tables.pool, tables.pool.layout.page_size, tables.length[index]
    longest = int(lengths.amax())
    tables.widen(longest + tokens)
    copies = int(named_elsewhere(pool, tables.table[index]).sum()) if state.shared else 0
    pages = lengths.numel() * pages_for(tokens, S) + copies
    quota.claim(pages, pages)
    pool.ensure_free(pages)
    promise = Promise(longest + tokens, lengths.numel(), S, copies, tables.generation)
    return replace(state, longest=longest, promise=promise)


def check_captured(state: State, columns: int, valid: Tensor | None) -> Promise:
    """What the step that is being captured may take. Raises CacheStateError where a graph cannot hold it."""
    promise = state.promise
    if promise is None or promise.slots < state.longest + columns or state.real is not None or valid is not None:
        raise CacheStateError("call `reserve` before a step is captured in a CUDA graph, and pad nothing")
    return promise


def replayed(tables: Tables, state: State, steps: int) -> State:
    """The state after a graph has read so many tokens of each sequence. Raises CacheStateError: see `Sequences`."""
    pool, promise = tables.pool, state.promise
    if promise is None or promise.generation != tables.generation:
        pool.torn = True  # the graph may have taken pages that nobody names
        raise CacheStateError(
            "the page tables have changed since this step was captured in a CUDA graph, and its replays are lost; "
            "call `reserve` and capture it again after sequences have joined, left or outgrown their tables"
        )
    pool.demand.claimed += promise.heads * pages_for(steps, promise.page_size)
    pool.post()
    return replace(state, seen=state.seen + steps, longest=state.longest + steps)
