"""The store of computed prompts: what `octavo.attach(..., reuse=store)`, the engine and the commands share.

A request goes `open` (find the longest prefix that can be gone on from, restore it, name boundaries to be kept), the
model reads the rest, `Reading.insert`, `Reading.close`. Records are found in `octavo.reuse.index`; which boundary can
be gone on from is `octavo.reuse.cover`'s to say; files and what lies on a server are `octavo.reuse.tiers`' to write.
"""

import functools
import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.kv import PagedCache
from octavo.kv.restoring import layout_of
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse import admin
from octavo.reuse.answers import AnswerSettings, kept
from octavo.reuse.costs import Costs
from octavo.reuse.cover import NOTHING, Plan
from octavo.reuse.flights import Flight, Flights
from octavo.reuse.forks import free_in_forks
from octavo.reuse.index import Index
from octavo.reuse.planning import planned
from octavo.reuse.reading import Reading
from octavo.reuse.record import Record, Space, Tokens, token_array
from octavo.reuse.shelf import Rules
from octavo.reuse.similar import SimilarSettings, made
from octavo.reuse.stats import Explanation, Listed, Stats
from octavo.reuse.terms import Terms, at_least_one, seconds
from octavo.reuse.tiers import Tiers
from octavo.reuse.wanted import Keeping, intervals

PATIENCE = 600.0  # seconds for which a request waits for another one's computation


class ReuseStore:
    """Keys and values of prompts that were read before, by their tokens, on up to three tiers.

    `memory`: bytes of host memory, a number or a text such as "1GiB", bookkeeping included; None: no such tier. What a
    model on a GPU stores is locked there, since CUDA copies from it at hits. What is known of a server takes at most
    half of it (512 MiB without), and what was used longest ago is forgotten.
    `disk`: a folder, which several processes may share and which outlives them; `disk_budget`: bytes of its files.
    `remote`: a Redis or Valkey server, which several machines may share: a URL such as "redis://host:6379/0" or a
    `redis.Redis` (needs the extra `redis`); its own settings bound it and choose what leaves. `policy`: "slru" or
    "lru" (`octavo.reuse.shelf`). `ttl`: seconds after which what was stored is gone, None: never. `quotas`: bytes in
    memory and on disk by tenant. `back`, `every`, `shortest`, `turns`: `octavo.reuse.wanted.Keeping`. `similar`:
    whether and how similar prompts help, approximately (`octavo.reuse.similar`). `answers`: whether whole answers are
    given again (`octavo.reuse.answers`). `clock`: epoch seconds, for tests.

    For several threads at once. What fails here (a full disk, a damaged file, a server that is away) costs a warning
    and a hit, never an answer. Raises ConfigError for wrong settings, OutputFileError where the folder cannot be made.
    """

    def __init__(
        self,
        memory: int | str | None = "1GiB",
        disk: str | Path | None = None,
        disk_budget: int | str | None = None,
        *,
        remote: Any = None,
        policy: str = "slru",
        ttl: float | None = None,
        quotas: Mapping[str, int | str] | None = None,
        back: int = 128,
        every: int | None = None,
        shortest: int = 64,
        turns: int = 2,
        similar: bool | SimilarSettings = False,
        answers: bool | AnswerSettings = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if memory is None and disk is None and remote is None:
            raise ConfigError("a store needs a tier: give memory, disk or remote")
        self._settings: dict[str, Any] = {
            "memory": memory, "disk": disk, "disk_budget": disk_budget, "remote": remote, "policy": policy,
            "ttl": ttl, "quotas": quotas, "back": back, "every": every, "shortest": shortest, "turns": turns,
            "similar": similar, "answers": answers,
        }  # fmt: skip
        self.keeping = Keeping(back, every, shortest, turns)
        bounds = {tenant: at_least_one(size, f"quota of {tenant!r}") for tenant, size in (quotas or {}).items()}
        in_memory = None if memory is None else Rules(at_least_one(memory, "memory"), policy, bounds)
        on_disk = Rules(None if disk_budget is None else at_least_one(disk_budget, "disk_budget"), policy, bounds)
        self.clock = clock
        self.lock = threading.RLock()
        free_in_forks(self.lock)
        self.index = Index(in_memory, on_disk)
        self.counts: Counter[str] = Counter()
        self.costs = Costs()
        self.flights = Flights()
        self._warned: set[str] = set()
        usual = Terms(ttl=seconds(ttl))
        self._terms = ContextVar("terms", default=usual)
        self.tiers = Tiers(self, None if disk is None else Path(disk).expanduser(), remote)
        self.similar = made(self, similar)
        self.answers = kept(self, answers)
        self.tiers.refresh()

    @contextmanager
    def request(
        self, *, tenant: str | None = None, tags: Sequence[str] | None = None, ttl: float | None = None
    ) -> Iterator[None]:
        """Under what this thread's requests run meanwhile: nothing of one tenant is ever found by another; `tags` and
        `ttl` (seconds) go to what is stored. None: as before. Threads that are started meanwhile know nothing of it;
        `contextvars.copy_context().run` takes it there. Raises ConfigError."""
        if isinstance(tags, str) or not isinstance(tenant, str | None):
            raise ConfigError(f"tags must be a list of texts and tenant a text, not {tags!r} and {tenant!r}")
        old = self._terms.get()
        token = self._terms.set(
            Terms(
                old.tenant if tenant is None else tenant,
                old.tags if tags is None else tuple(tags),
                old.ttl if ttl is None else seconds(ttl),
            )
        )
        try:
            yield
        finally:
            self._terms.reset(token)

    # One request

    @property
    def shortest(self) -> int:
        """Prompts of fewer tokens are neither looked up nor stored."""
        return self.keeping.shortest

    def peek(self, cache: PagedCache, identity: Mapping[str, Any], tokens: Any) -> int:
        """How many tokens `open` would restore now, without doing anything."""
        ids, space = token_array(tokens), Space(identity, self._terms.get().tenant)
        with self.lock:
            self._look()
            layout = layout_of(cache.tables, cache.sequences.shift)
            return planned(self, space.name, ids, layout)[1].boundary

    def open(
        self,
        cache: PagedCache,
        identity: Mapping[str, Any],
        tokens: Any,
        *,
        padding: int = 0,
        restore: bool = True,
        wait: bool = True,
        learned: Sequence[int] = (),
        ends: Sequence[int] = (),
    ) -> Reading:
        """Restore the longest known prefix of a prompt into an empty cache, and have it keep what later ones will need.

        `identity`: what the model is, JSON values by field. `tokens` [n] are the prompt's; at most n - 1 are restored.
        `padding`: columns before the prompt in a batch, of which nothing is restored (`restore` False). `wait`: for a
        thread that computes the same prefix now. `learned`: more boundaries to keep; `ends`: where turns of a chat end.
        Raises CacheBudgetError where the pages have no room; the cache is empty then.
        """
        ids, terms, layout = token_array(tokens), self._terms.get(), layout_of(cache.tables, cache.sequences.shift)
        space = Space(identity, terms.tenant)
        while True:
            opened: list[Reading] = []  # `_begin` fills it, so that an interrupt at its return leaves nothing open
            try:
                with self.lock:
                    self._look()
                    matched, chosen = planned(self, space.name, ids, layout) if restore else (0, NOTHING)
                    kept = self.keeping.boundaries(layout, len(ids), (matched, *learned), ends)
                    kept = tuple(p for p in kept if p > chosen.boundary)
                    flight = self._awaited(space.name, ids, layout, chosen.boundary) if wait else None
                    if flight is None:
                        self._begin(opened, space, layout, ids, chosen, kept, (terms.tags, terms.ttl))
                    else:
                        self.counts["waited"] += 1
                if flight is None and opened[0].restore(cache):
                    cache.keep(p + padding for p in kept if p < len(ids))
                    return opened[0]
            except BaseException:
                for reading in opened:
                    reading.close()
                raise
            if flight is not None:
                wait = flight.landed.wait(PATIENCE)
            for reading in opened:
                reading.close()  # a file was damaged and is dropped: look again

    def _awaited(self, space: str, tokens: Tokens, layout: SnapshotLayout, held: int) -> Flight | None:
        return self.flights.worth_waiting(space, tokens, layout, held, self.keeping.shortest, len(tokens) - 1)

    def _begin(
        self, opened: list[Reading], space: Space, layout: SnapshotLayout, ids: Tokens, chosen: Plan, *rest: Any
    ) -> None:
        """Inside the lock: what is gone on from stays, and others may wait. `opened` has the reading before either."""
        reading = Reading(self, space, layout, ids, chosen, *rest)
        if len(ids) - chosen.boundary >= self.keeping.shortest:
            reading.flight = Flight(space.name, ids, intervals(layout, reading.boundaries))
        opened.append(reading)
        reading.hold()
        if reading.flight is not None:
            self.flights.add(reading.flight)

    def put(self, record: Record, parents: set[Record]) -> bool:
        """Take in a new record, inside the lock, after others have left for it; False where it has no room."""
        index, memory, tenant = self.index, self.index.memory, record.entry.tenant
        known = index.records.get(record.key)
        if known is not None:  # on a server that is away, or to be deleted once that has been looked at
            return admin.renew(self, known, record)
        self.counts["evicted"] += len(index.forget_far(record.index_nbytes, parents))
        gone = index.clear_memory(record.nbytes + record.index_nbytes, tenant, parents)
        stays = gone is not None
        if not stays and self.tiers.writable:
            gone = [] if memory is None else index.clear_memory(record.index_nbytes, tenant, parents)
        if gone is None:
            self.counts["refused"] += 1
            if memory is not None and record.nbytes > (memory.rules.budget or record.nbytes):
                self.warn("refused", f"a prompt's {record.nbytes:,} bytes are more than the reuse cache may hold")
            return False
        self.counts["evicted"] += len(gone)
        index.add(record, parents)
        if stays and memory is not None:
            memory.add(record)
        self.counts["inserted"] += 1
        self.tiers.write(record, stays=stays)
        return True

    def in_memory(self, record: Record) -> bool:
        """Whether the memory tier has a record."""
        memory = self.index.memory
        return memory is not None and record in memory.records

    def _look(self, patient: bool = False) -> None:
        """Inside the lock: take in what time and others have changed, `patient`: however long it takes."""
        self.index.now = self.clock()
        self.tiers.refresh(patient)
        admin.expire(self)

    def forget(self, record: Record) -> int:
        """Drop a record and what goes on from it, files too; returns how many there were. Inside the lock."""
        gone = self.index.drop(record)
        for each in gone:
            self.tiers.remove(each)
        return len(gone)

    def warn(self, kind: str, message: str) -> None:
        """Warn once of each kind of failure; the request goes on without the cache."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    # What users ask of it

    def stats(self) -> Stats:
        """Counts since it was opened, and what it holds."""
        with self.lock:
            self._look()
            return admin.stats(self)

    def list(self) -> Sequence[Listed]:
        """All records, the one that was used last first."""
        with self.lock:
            self._look(patient=True)
            return admin.listed(self)

    def explain(self, prompt: Any) -> Explanation:
        """How far the next request for a prompt (ids, or what a tokenizer returns) would hit, and why not further.

        Of several models' namespaces that where it would hit most. Raises InputError.
        """
        ids = token_array(prompt)
        with self.lock:
            self._look(patient=True)
            return admin.explain(self, ids, self._terms.get().tenant)[0]

    def pin(self, prompt: Any, ttl: float | None = None) -> int:
        """Keep what a prompt would go on from for `ttl` seconds, None: until `unpin`; returns how many tokens that is.

        Raises InputError, and ConfigError for a ttl that is not above 0.
        """
        ids, until = token_array(prompt), self.clock() + seconds(ttl)
        with self.lock:
            self._look(patient=True)
        return admin.pin(self, ids, self._terms.get().tenant, until)

    def unpin(self, prompt: Any) -> int:
        """Let go of what `pin` kept; returns of how many tokens."""
        with self.lock:
            self._look(patient=True)
        return admin.pin(self, token_array(prompt), self._terms.get().tenant, -math.inf)

    def delete(
        self, *, prefix: Any = None, tag: str | None = None, tenant: str | None = None, key: str | None = None
    ) -> int:
        """Delete the records whose tokens begin with `prefix`, that have a tag, a tenant, or a key that begins so; of
        several conditions all must hold. Returns how many.

        What prompts that stay go on from stays too, cut where they part from what is deleted. What a server has that is
        away is deleted when it is back, if this store lives so long. Raises InputError, and ConfigError where no
        condition is given.
        """
        ids = None if prefix is None else token_array(prefix)
        fits = admin.condition(ids, tag, tenant, key)
        self.flush()
        with self.lock:
            self._look(patient=True)
            count = admin.delete(self, {record for record in self.index.records.values() if fits(record.entry)})
            count += self.tiers.delete(fits)
            admin.expire(self)
            if self.answers is not None and key is None:
                self.answers.delete(ids, tag, tenant)
        self.flush()
        return count

    def clear(self) -> None:
        """Delete everything, files and what lies on the server too."""
        self.flush()
        with self.lock:
            self._look(patient=True)
            for record in list(self.index.records.values()):
                self.forget(record)
            self.tiers.delete(lambda entry: True)
            admin.expire(self)
            if self.answers is not None:
                self.answers.delete(None, None, None)
        self.flush()

    def verify(self) -> tuple[str, ...]:
        """Read and check all that is on disk and the server; returns what was wrong with what was not whole, which is
        dropped."""
        self.flush()
        with self.lock:
            self._look(patient=True)
            return admin.verify(self)

    def flush(self) -> None:
        """Wait until everything that was inserted is on disk and the server."""
        self.tiers.flush()

    def close(self) -> None:
        """Wait as `flush` does and end the thread that writes; the store can still be read."""
        self.tiers.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReuseStore":
        return self  # a copied model goes on with the same store; its weights decide what it finds

    def __reduce__(self) -> Any:
        if not isinstance(self._settings["remote"], str | None):
            raise ConfigError("a store with a redis.Redis cannot be pickled; give remote as a URL")
        return functools.partial(ReuseStore, **self._settings), ()
