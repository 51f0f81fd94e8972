"""One memory for all caches of an attached model on one device: a page pool, and tables per mode of the model."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from octavo.attention import PageLayout
from octavo.kv.pool import PagePool
from octavo.kv.tables import Holder, Tables

Method = TypeVar("Method", bound=Callable[..., Any])


def bookkeeping(method: Method) -> Method:
    """No gradients, and nothing made in inference mode: such a tensor could never be written outside it again."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class Memory:
    """Pages of one layout on one device, and the sequences that hold them.

    `budget` bounds the bytes of all pages (None: no bound). Sequences of models with another number of KV layers
    (SwiftKV on or off) have tables of their own over the same pool.
    """

    @bookkeeping
    def __init__(self, layout: PageLayout, kv_heads: int, device: torch.device, budget: int | None) -> None:
        self.layout = layout
        self.kv_heads = kv_heads
        self.device = device
        self.budget = budget
        self.pool = PagePool(layout, device, budget)
        self._tables: dict[tuple[int, int | None, int], Tables] = {}
        self._ended: list[tuple[Tables, Holder]] = []  # what caches had that nobody has any more

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held for all sequences: pages, free or in use, and tables."""
        self.reclaim()
        return self.pool.nbytes + sum(tables.nbytes for tables in self._tables.values())

    @property
    def sequences(self) -> int:
        """Sequences held."""
        self.reclaim()
        return sum(tables.taken for tables in self._tables.values())

    @bookkeeping
    def tables(self, layers: int, window: int | None, longest: int = 0) -> Tables:
        """The tables of sequences with this many KV layers; a marked token stays for `window` more.

        `longest`: tokens that the longest window of a layer shows; 0: no layer has one.
        """
        mode = layers, window, longest
        with self.pool.lock:
            if mode not in self._tables:
                self._tables[mode] = Tables(self.pool, layers, self.kv_heads, window, longest)
            return self._tables[mode]

    def give_back_with(self, owner: object, tables: Tables, holder: Holder) -> None:
        """Give rows back when `owner` is gone; which rows `holder` has may change until then.

        A finaliser may run at any moment, so it only notes them; the next step gives them back.
        """
        with self.pool.lock:
            tables.holders[id(holder)] = weakref.ref(owner), holder
        weakref.finalize(owner, self._ended.append, (tables, holder)).atexit = False

    @bookkeeping
    def reclaim(self) -> None:
        """Give back what caches held that nobody has any more, and memory that is idle in excess."""
        pool = self.pool
        with pool.lock:
            if self._ended or pool.torn:
                with pool.changing():
                    while self._ended:
                        tables, holder = self._ended.pop()  # should an interrupt follow, nobody has its rows
                        if tables.holders.pop(id(holder), None) is not None:
                            tables.leave(holder.rows)
            if pool.shrinks():
                with pool.changing():
                    pool.trim()

    @bookkeeping
    def trim(self, spare: int | None = None) -> None:
        """Give memory back to the device in which no page is in use, but keep `spare` bytes of free pages.

        None: 64 MiB on the host, on CUDA 1/32 of the device's memory.
        """
        self.reclaim()
        with self.pool.lock, self.pool.changing():
            self.pool.trim(spare)
            for tables in self._tables.values():
                tables.trim()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memory":
        return Memory(self.layout, self.kv_heads, self.device, self.budget)
