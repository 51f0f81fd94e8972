"""The page pool: pages on slabs that never move, a stack of free ones, a reference count each, one byte budget.

Pages are taken, shared, copied and given back by tensor operations on the device, so that a decode step needs no answer
from it. The host only sees to it that enough pages are backed by memory before a step takes some: it knows an upper
bound of the pages in use, and the true number, which is read without waiting, one step late.
"""

import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsInt, TypeVar

import torch
from torch import Tensor

from octavo.attention import PageLayout
from octavo.attention.cpu import copies
from octavo.errors import CacheBudgetError
from octavo.kv.demand import Demand
from octavo.kv.late import capturing
from octavo.kv.space import reserve, slab_of, spare_of

if TYPE_CHECKING:
    from octavo.kv.tables import Tables

NOWHERE = 0  # the page that stays zero: what tables name past a row's length
WASTE = 1  # the page that takes what nobody will read, so that writing needs no selection
GROWTH = 32  # spare room on growth: 1/32 of the pool, so that decoding rarely grows it

Number = TypeVar("Number", int, Tensor)


def pages_for(slots: Number, page_size: int) -> Number:
    """Pages that so many slots fill or begin to fill; int, or a tensor of integers."""
    return (slots + (page_size - 1)) // page_size


class Changing:
    """What surrounds every change of references, stack and tables, inside the lock, outermost only.

    A change that does not end well (an interrupt, no memory) leaves `PagePool.torn` set, and whoever changes something
    next puts all in order first. Until then nobody works with counts that are half right, since all of them come here.
    """

    def __init__(self, pool: "PagePool") -> None:
        self._pool = pool

    def __enter__(self) -> None:
        self._pool.settle()
        self._pool.torn = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._pool.torn = False


class PagePool:
    """Pages of one layout on one device.

    `pages`: views of all of them (`octavo.attention.Pages`). `references` [P] int32: rows that name each page.
    `free` [P] int32: a stack of free page ids, of which the first `free_count` (int64 scalar on the device) are valid.
    `budget` bounds `nbytes`; None is no bound. A page that is not in use is zero.

    `lock` guards the pool and all tables over it: hold it wherever they are read to be written. `torn` says that a
    change was interrupted, see `Changing`. `demand`: how many pages are in use and promised, as far as the host knows.
    """

    def __init__(self, layout: PageLayout, device: torch.device, budget: int | None) -> None:
        self.layout = layout
        self.device = device
        self.budget = budget
        self.lock = threading.RLock()
        self.tables: weakref.WeakSet[Tables] = weakref.WeakSet()  # whose rows name pages of this pool
        self._memory = reserve(device, self._room(budget), layout.nbytes)
        most = len(self._memory.memory) // layout.nbytes
        self.raw = self._memory.memory[: most * layout.nbytes].view(torch.int64).view(most, -1)  # [P, bytes / 8]
        self.pages = layout.views(self._memory.memory)
        self._counts = [reserve(device, 4 * most) for _ in range(2)]
        self.references, self.free = (r.memory[: 4 * most].view(torch.int32) for r in self._counts)
        self.free_count = torch.zeros((), dtype=torch.int64, device=device)
        self._usable = torch.zeros(0, dtype=torch.bool)  # [p] pages that have memory, on the host
        self.size = 0  # how many
        self.torn = False
        self.demand = Demand(device)
        self._grow(2)
        self.references[: WASTE + 1] = 1
        self.free_count -= 2
        self.demand.know(2)

    def _room(self, budget: int | None) -> int | None:
        """Bytes of pages that a budget leaves when counts and the stack have theirs, all in whole slabs."""
        if budget is None:
            return None
        slab = slab_of(self.device, budget)
        slabs = (budget // slab - 2) * self.layout.nbytes // (self.layout.nbytes + 8)
        slabs -= slabs % -(-self.layout.nbytes // slab)  # a slab holds at least one page
        if slabs * slab < 2 * self.layout.nbytes:
            raise CacheBudgetError(f"a budget of {budget:,} bytes holds no page; at least {8 * slab:,} are needed")
        return slabs * slab

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held: pages, free or in use, reference counts and the stack."""
        return self._memory.nbytes + sum(r.nbytes for r in self._counts)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page, its reference count and its place on the stack included."""
        return self.layout.nbytes + 8

    def held(self) -> int:
        """Pages in use, read from the device."""
        with self.lock:
            self.settle()
            return self.size - int(self.free_count) - 2

    # What a step does, on the device

    def reserve(self, claim: int, need: SupportsInt, wait: bool = True) -> None:
        """Make sure that `need` pages are free, beside those promised; `claim` is what the host knows it is at most.

        The device is asked for `need` only where pages could run out; with `wait` false even then only where the budget
        has no room for all of `claim`, since in a decode step waiting costs more than pages that are backed a little
        early. Raises CacheBudgetError, with nothing changed, where the budget or the device has no room for `need`.
        """
        if capturing(self.device):
            return
        missing = self.demand.most + claim + self.demand.promised - self.size
        if missing > 0:
            grown = max(missing, self.size // GROWTH)
            if not wait and self._fits(grown):
                self._grow(grown)
            else:
                claim = int(need)
                self.ensure_free(claim)
        self.demand.claimed += claim

    def ensure_free(self, pages: int) -> None:
        """Grow where fewer are free, beside those promised. Waits for the device; raises CacheBudgetError."""
        free = int(self.free_count)
        self.demand.know(self.size - free)
        missing = pages + self.demand.promised - free
        if missing > 0:
            grown = max(missing, self.size // GROWTH)
            self._grow(grown if self._fits(grown) else missing)

    def post(self) -> None:
        """Ask for the true count of pages in use, to be had one step later."""
        self.demand.ask(self.free_count, self.size)

    def take(self, wanted: Tensor) -> Tensor:
        """A page for each True of `wanted` (bool, any shape): ids int64, `WASTE` where False."""
        flat = wanted.flatten()
        rank = flat.cumsum(0)
        at = (self.free_count - rank).clamp(min=0)
        ids = torch.where(flat, self.free[at].long(), WASTE)
        self.references.index_fill_(0, ids, 1)  # assigning a number would copy it from the host
        self.free_count -= rank[-1]
        return ids.view(wanted.shape)

    def share(self, ids: Tensor, wanted: Tensor) -> None:
        """Count one more reference to each of `ids` (int64, any shape) where `wanted` (bool)."""
        self.references.index_add_(0, ids.flatten(), wanted.flatten().int())

    def drop(self, ids: Tensor, wanted: Tensor) -> None:
        """Count one reference less to each of `ids` where `wanted`, no id twice; unnamed pages are given back."""
        flat, wanted = ids.flatten(), wanted.flatten()
        given = wanted & (self.references[flat] == 1)
        # First of all, so that an interrupt leaves no page that is free and not zero.
        if copies.suits(self.pages):
            copies.clear(self.pages, flat[given])
        else:
            self.raw.index_fill_(0, torch.where(given, flat, NOWHERE), 0)
        self.references.index_add_(0, flat, -wanted.int())
        rank = given.cumsum(0)
        # What is not given goes right above the new top of the stack, where anything may stand.
        self.free[torch.where(given, self.free_count + rank - 1, self.free_count + rank[-1])] = flat.int()
        self.free_count += rank[-1]
        self.demand.given_back()

    def own(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Pages to write into, int64 as `ids`: each of `ids` where `wanted`, or a copy of it where others name it too.

        Of several that want one page which nobody else names, the last keeps it. Pages to copy to must be reserved.
        """
        flat = torch.where(wanted, ids, NOWHERE).flatten()
        order = flat.argsort(stable=True)
        run = flat[order]
        first = torch.ones_like(run, dtype=torch.bool)
        first[1:] = run[1:] != run[:-1]
        at = torch.arange(len(run), device=run.device)
        rank = torch.empty_like(at)
        rank[order] = at - torch.where(first, at, 0).cummax(0).values  # among those that want the same page
        copied = wanted.flatten() & (self.references[flat] - rank > 1)
        fresh = self.take(copied)
        source = torch.where(copied, flat, NOWHERE)
        self.raw[fresh] = self.raw[source]
        self.references.index_add_(0, source, -copied.int())
        return torch.where(copied, fresh, ids.flatten()).view(ids.shape)

    # Growing, giving back, mending

    def _fits(self, pages: int) -> bool:
        """Whether the address range, so the budget, has room for so many more pages."""
        memory = self._memory
        return len(memory.backed) - (-pages * self.layout.nbytes // memory.slab) + 1 <= memory.slabs

    def _grow(self, pages: int) -> None:
        """Back at least so many more pages with memory and put them on the stack."""
        memory, wanted = self._memory, self.size + pages
        slab = 0
        try:
            while self.size < wanted:
                for _ in range(-(-(wanted - self.size) * self.layout.nbytes // memory.slab)):
                    while slab in memory.backed:
                        slab += 1
                    if slab >= memory.slabs:
                        raise CacheBudgetError(
                            f"the KV cache needs {pages * self.layout.nbytes:,} bytes beside the {self.nbytes:,} it "
                            f"holds, and its budget is {self.budget or len(memory.memory):,}; raise the budget, "
                            "shorten the input or use an adapter that evicts more"
                        )
                    memory.back(slab)
                self._add_backed()
        except BaseException:
            self._add_backed()  # what there is, is not lost
            raise

    def _backed_pages(self) -> Tensor:
        """Which pages have memory, [p] bool on the host."""
        memory, nbytes = self._memory, self.layout.nbytes
        slabs = max(memory.backed, default=-1) + 1
        backed = torch.zeros(slabs, dtype=torch.bool)
        backed[list(memory.backed)] = True
        pages = torch.arange(slabs * memory.slab // nbytes)
        return backed[pages * nbytes // memory.slab] & backed[(pages * nbytes + nbytes - 1) // memory.slab]

    def _add_backed(self) -> None:
        """Put pages that have memory now on the stack, the lowest on top."""
        usable = self._backed_pages()
        fresh = usable.clone()
        fresh[: len(self._usable)] &= ~self._usable[: len(usable)]
        ids = fresh.nonzero()[:, 0].tolist()
        self._back_counts(len(usable))
        if ids:
            at = self.free_count + torch.arange(len(ids), device=self.device)
            self.free[at] = self._listed(ids)
            self.free_count += len(ids)
        self._usable, self.size = usable, self.size + len(ids)

    def _back_counts(self, pages: int) -> None:
        """Back the counts and the stack of so many pages with memory."""
        for counts in self._counts:
            for slab in range(-(-4 * pages // counts.slab)):
                counts.back(slab)

    def _listed(self, ids: list[int]) -> Tensor:
        """Ascending ids on the device, the last one first, int32: made there, since a copy would wait for it."""
        runs, first = [], 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or ids[i] != ids[i - 1] + 1:
                runs.append(torch.arange(ids[first], ids[i - 1] + 1, dtype=torch.int32, device=self.device))
                first = i
        return torch.cat(runs).flip(0)

    def shrinks(self) -> bool:
        """Whether `trim` is due: pages were given back, and the host knows of far more free ones than are spared."""
        fell = self.demand.fell()
        return fell and (self.size - self.demand.most) * self.layout.nbytes > spare_of(self.device) * 5 // 4

    def trim(self, spare: int | None = None) -> None:
        """Give slabs back in which no page is in use, but keep `spare` bytes of free pages. Waits for the device.

        `spare` None: see `space.spare_of`. Pages that are promised are kept in any case.
        """
        memory, nbytes = self._memory, self.layout.nbytes
        spare = max(self.demand.promised * nbytes, spare_of(self.device) if spare is None else spare)
        free = int(self.free_count)
        if free * nbytes <= spare:
            return
        used = self.references[: len(self._usable)].cpu() > 0
        pages = used.nonzero()[:, 0] * nbytes
        busy = {*(pages // memory.slab).tolist(), *((pages + nbytes - 1) // memory.slab).tolist()}
        excess = (free * nbytes - spare) // memory.slab
        for slab in sorted(memory.backed - busy, reverse=True)[:excess]:
            memory.release(slab)
        self._usable = self._backed_pages()
        self._recount(used[: len(self._usable)])

    def changing(self) -> Changing:
        """See `Changing`: `with pool.lock, pool.changing():`."""
        return Changing(self)

    def settle(self) -> None:
        """Finish what an interrupted change has left, inside the lock."""
        if self.torn:
            self.mend()
            self.torn = False

    def mend(self) -> None:
        """Count all anew from what batches hold: what no batch has is vacant, what no row names is free."""
        for tables in self.tables:
            tables.vacate()
        self._usable = self._backed_pages()
        self._back_counts(len(self._usable))
        counted = torch.zeros(len(self._usable), dtype=torch.int32, device=self.device)
        for ids in [tables.held() for tables in self.tables]:
            counted.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        counted[: WASTE + 1] = 1
        before = self.references[: len(self._usable)]
        self.raw[((before > 0) & (counted == 0)).nonzero()[:, 0]] = 0
        self.references[: len(self._usable)] = counted
        self._recount(counted.cpu() > 0)

    def _recount(self, used: Tensor) -> None:
        """Make the stack of free pages anew: those with memory that are not `used` [p] bool."""
        free = (self._usable & ~used).nonzero()[:, 0].flip(0).int()
        self.free[: len(free)] = free.to(self.device)
        self.free_count.fill_(len(free))
        self.size = int(self._usable.sum())
        self.demand.know(self.size - len(free))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagePool":
        return PagePool(self.layout, self.device, self.budget)
