"""One tier's budget: what lies there, and who leaves so that something else has room."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.reuse.record import Record

POLICIES = ("slru", "lru")
PROTECTED = 0.8  # of a budget: what may be held for records that were used again


@dataclass(frozen=True)
class Rules:
    """How a tier decides. `budget` and each of `quotas` (by tenant) are bytes, None: no bound.

    "lru": who was used longest ago leaves first. "slru": who was never used again leaves before anybody who was, so a
    burst of prompts that come once does not flush the others (segmented LRU, Karedla et al. 1994).
    """

    budget: int | None
    policy: str
    quotas: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be {' or '.join(POLICIES)}, not {self.policy!r}")


class Shelf:
    """The records of one tier.

    `size` gives a record's bytes there, `beside` those that are free as well once it has left. `may_leave(record,
    leaving)` says whether nothing needs it once the records `leaving` are gone.
    """

    def __init__(
        self,
        rules: Rules,
        size: Callable[[Record], int],
        may_leave: Callable[[Record, Set[Record]], bool],
        beside: Callable[[Record], int] = lambda record: 0,
    ) -> None:
        self.rules, self.size, self.may_leave, self.beside = rules, size, may_leave, beside
        self.records: set[Record] = set()
        self.protected: set[Record] = set()
        self.nbytes = self.protected_nbytes = 0
        self.by_tenant: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Take note of a record that lies here now."""
        if record not in self.records:
            self.records.add(record)
            self.nbytes += self.size(record)
            self.by_tenant[record.entry.tenant] += self.size(record)

    def remove(self, record: Record) -> None:
        """Take note of a record that does not any more."""
        if record in self.records:
            self._demote(record)
            self.records.discard(record)
            self.nbytes -= self.size(record)
            self.by_tenant[record.entry.tenant] -= self.size(record)
            if not self.by_tenant[record.entry.tenant]:
                del self.by_tenant[record.entry.tenant]

    def used(self, record: Record) -> None:
        """Take note that a record was used again."""
        if self.rules.policy == "slru" and record in self.records and record not in self.protected:
            self.protected.add(record)
            self.protected_nbytes += self.size(record)
        if self.rules.budget is not None:
            while self.protected_nbytes > PROTECTED * self.rules.budget and len(self.protected) > 1:
                self._demote(min(self.protected, key=lambda r: r.order))

    def _demote(self, record: Record) -> None:
        if record in self.protected:
            self.protected.discard(record)
            self.protected_nbytes -= self.size(record)

    def leaving(
        self, nbytes: int, tenant: str, now: float, spared: Collection[Record] = (), fixed: int = 0
    ) -> list[Record] | None:
        """Who must leave, in this order, so that a tenant's record of so many bytes fits; None: it never will.

        `spared` stay. `fixed`: bytes of the budget that are taken otherwise.
        """
        budget, quota = self.rules.budget, self.rules.quotas.get(tenant)
        free = None if budget is None else budget - fixed - self.nbytes
        own = None if quota is None else quota - self.by_tenant[tenant]
        out: list[Record] = []
        gone: set[Record] = set()
        ranked: list[Record] = []
        while (free is not None and free < nbytes) or (own is not None and own < nbytes):
            ranked = ranked or sorted(self.records, key=lambda r: (r.ends > now, r in self.protected, r.order))
            only = tenant if own is not None and own < nbytes else None
            victim = next(
                (
                    r
                    for r in ranked
                    if r not in gone
                    and r not in spared
                    and r.users == 0
                    and only in (None, r.entry.tenant)
                    and self.may_leave(r, gone)
                ),
                None,
            )
            if victim is None:
                return None
            out.append(victim)
            gone.add(victim)
            free = None if free is None else free + self.size(victim) + self.beside(victim)
            if own is not None and victim.entry.tenant == tenant:
                own += self.size(victim)
        return out
