"""One request's way through the store: what it goes on from, what of its prompt is kept, what it adds."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.kv import PagedCache
from octavo.kv.extent import Extent, Piece, assembled, extent_of
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.cover import Plan, longest, missing, reach
from octavo.reuse.flights import Flight
from octavo.reuse.index import ancestors
from octavo.reuse.record import Entry, Record, Space, Tokens, token_array
from octavo.reuse.wanted import intervals

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore


class Reading:
    """A prompt that is being read into a cache, of whose tokens the first `boundary` came from the store.

    `close` ends it, in any case: until then what it goes on from stays, and others may wait for it.
    """

    def __init__(
        self,
        store: "ReuseStore",
        space: Space,
        layout: SnapshotLayout,
        tokens: Tokens,
        plan: Plan,
        boundaries: tuple[int, ...],
        tags: Any,
    ) -> None:
        self.store, self.space, self.layout, self.tokens, self.plan = store, space, layout, tokens, plan
        self.boundary, self.boundaries = plan.boundary, boundaries
        self.flight: Flight | None = None
        self._tags, self._ttl = tags
        self._held: set[Record] = set()  # what must not leave meanwhile
        self._began: float | None = time.perf_counter()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the model was when this was opened."""
        return self.space.identity

    def hold(self) -> None:
        """See to it that what this goes on from stays, until `close`; inside the store's lock."""
        for record in self.plan.records:
            self._held.add(record)
            record.users += 1

    def restore(self, cache: PagedCache) -> bool:
        """Fill an empty cache with what was found; False where a file turns out to be damaged.

        Raises CacheBudgetError, and the cache is empty then.
        """
        store = self.store
        extents: dict[Record, Extent] = {}
        ordered = sorted(self.plan.records, key=lambda r: r.entry.first)
        for record in ordered:
            extent = store.tiers.fetch(record)
            if extent is None:
                return False
            extents[record] = extent
        if ordered:
            pieces = [Piece(extents[s.record], s.first, s.last, s.tail) for s in self.plan.shares]
            newest = None if self.plan.newest is None else extents[self.plan.newest]
            layout = ordered[0].entry.layout
            cache.sequences.restore(layout, assembled(pieces, newest, self.boundary), self.boundary)
        with store.lock:
            hit = int(self.boundary > 0)
            store.counts.update(requests=1, hits=hit, asked=len(self.tokens), reused=self.boundary)
            for record in reversed(ordered):
                store.index.used(record)
                store.tiers.touch(record)
        self._began = time.perf_counter()
        return True

    def insert(self, cache: PagedCache, which: int = 0, tokens: Any = None) -> bool:
        """Store what sequence `which` of a cache has read; `tokens` [n] are its ids where it has read past its prompt.

        False where nothing was stored: all of it is there already, or it does not fit. Others that wait for this prompt
        go on. What the cache kept at boundaries for this is given back.
        """
        try:
            return self._insert(cache, which, self.tokens if tokens is None else token_array(tokens))
        finally:
            cache.sequences.let_go(which, self.boundaries)
            self._land()

    def _insert(self, cache: PagedCache, which: int, tokens: Tokens) -> bool:
        sequences, store = cache.sequences, self.store
        end = int(sequences.position[which])
        self._measure(min(end, len(tokens)) - self.boundary)
        if end < store.keeping.shortest or end > len(tokens):
            return False
        tokens = tokens[:end]
        for _ in range(2):  # what was there may have been deleted while the slots were fetched
            with store.lock:
                new = self._lacking(sequences.shift, tokens)
            if new is None:
                return False
            first, held = new
            extent = extent_of(sequences, which, first, held)
            sizes = {name: len(part.position) for name, part in extent.parts.items()}
            now = store.clock()
            entry = Entry(
                self.space.name, self.space.identity, self.space.tenant, self._tags, now, now + self._ttl,
                extent.layout, tokens, first, extent.last, extent.held, extent.newest is not None, sizes,
            )  # fmt: skip
            with store.lock:
                found = store.index.find(self.space.name, tokens, extent.layout)[1]
                parents = ancestors(found, extent.layout, first)
                stored = parents is not None and store.put(record := Record(entry, extent.nbytes, extent), parents)
            if parents is not None:
                if stored and not store.in_memory(record):
                    store.flush()  # what has no room in memory must not pile up there
                return stored
        return False

    def _lacking(self, shift: int, tokens: Tokens) -> tuple[int, tuple[tuple[int, int], ...]] | None:
        """(first position, intervals of marked slots) of what the store lacks; None: it has all of it."""
        layout, decided = self.layout, len(tokens) - shift
        _, found = self.store.index.find(self.space.name, tokens, layout)
        kept = min(reach(found), decided)
        wanted = intervals(layout, {*(p for p in self.boundaries if p <= len(tokens)), len(tokens)})
        held = missing(wanted, found, layout)
        whole = longest(found, layout, len(tokens)) == len(tokens)
        if kept == decided and not held and whole:
            return None
        return min([kept, *(low for low, _ in held)]), held

    def _measure(self, computed: int) -> None:
        """Tell the store how long the prompt took, once."""
        if self._began is not None and computed >= self.store.keeping.shortest:  # of a few tokens little can be told
            self.store.costs.computed(self.space.name, computed, time.perf_counter() - self._began)
        self._began = None

    def _land(self) -> None:
        if self.flight is not None:
            self.store.flights.land(self.flight)
            self.flight = None

    def close(self) -> None:
        """Let go of what this went on from, and let others compute what was not inserted."""
        self._land()
        with self.store.lock:
            while self._held:
                self._held.pop().users -= 1

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
