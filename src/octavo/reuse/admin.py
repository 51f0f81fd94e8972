"""What users ask of a store beside reuse: what it holds, why a prompt would miss, pinning, deleting, checking."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from octavo.errors import ConfigError, ReuseFileError
from octavo.reuse.cover import longest, plan
from octavo.reuse.index import ancestors
from octavo.reuse.record import Entry, Record, Tokens
from octavo.reuse.stats import Explanation, Listed, Stats
from octavo.reuse.tree import common

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore


def stats(store: "ReuseStore") -> Stats:
    """See `ReuseStore.stats`."""
    index = store.index
    return Stats(
        **store.counts,
        similar_kl=0.0 if store.similar is None else store.similar.mean_kl,
        answers_given=0 if store.answers is None else store.answers.given,
        answers_nbytes=0 if store.answers is None else store.answers.nbytes,
        memory_nbytes=index.memory_nbytes,
        memory_records=sum(record.extent is not None for record in index.records.values()),
        disk_nbytes=index.disk.nbytes,
        disk_records=len(index.disk.records),
        remote_nbytes=index.remote.nbytes,
        remote_records=len(index.remote.records),
    )


def listed(store: "ReuseStore") -> list[Listed]:
    """See `ReuseStore.list`."""
    out = []
    for record in sorted(store.index.records.values(), key=lambda r: -r.order):
        entry = record.entry
        memory, disk = record.extent is not None, record.path is not None
        out.append(
            Listed(
                record.key,
                entry.space,
                entry.tenant,
                entry.tags,
                len(entry.tokens),
                entry.first,
                record.nbytes,
                memory,
                disk,
                entry.created,
                record.expires,
                record.pinned,
                record.remote_nbytes > 0,
            )
        )
    return out


def explain(store: "ReuseStore", tokens: Tokens, tenant: str) -> list[Explanation]:
    """See `ReuseStore.explain`."""
    index = store.index
    spaces = {r.entry.space: r.entry.layout for r in index.records.values() if r.entry.tenant == tenant}
    if not spaces:
        return [Explanation("", len(tokens), 0, 0, "nothing is stored for this tenant")]
    made = []
    for space, layout in spaces.items():
        matched, found = index.find(space, tokens, layout)
        boundary = longest(found, layout, len(tokens) - 1)
        reason = _reason(store, space, tokens, matched, boundary)
        if store.similar is not None and (saved := store.similar.helps(space, tokens, layout, boundary)):
            reason += f"; similar prompts, whose keys are approximate here, would save {saved} tokens"
        made.append(Explanation(space, len(tokens), matched, boundary, reason))
    return sorted(made, key=lambda e: (-e.boundary, -e.matched))


def _reason(store: "ReuseStore", space: str, tokens: Tokens, matched: int, boundary: int) -> str:
    shortest = store.keeping.shortest
    if len(tokens) < shortest:
        return f"prompts of fewer than {shortest} tokens are not looked up"
    if boundary == len(tokens) - 1 and matched == len(tokens):
        return "all of it is stored; the last token is always computed"
    stored = max(
        (r.entry.tokens for r in store.index.records.values() if r.entry.space == space),
        key=lambda t: common(t, tokens),
    )
    if matched == len(tokens):
        differs = "stored prompts go on with other tokens after it"
    elif matched < len(stored):
        differs = f"token {matched} differs: {int(stored[matched])} is stored, {int(tokens[matched])} is asked for"
    else:
        differs = f"what is stored ends after token {matched - 1}"
    if 0 < boundary < shortest:
        return f"{differs}; {boundary} tokens are too few to reuse"
    if boundary < matched:
        return (
            f"{differs}; of the {matched} equal tokens {boundary} can be gone on from, since marked tokens are kept "
            f"around some boundaries only; once computed, it can be gone on from at {matched}"
        )
    return differs


def covering(store: "ReuseStore", tokens: Tokens, tenant: str) -> set[Record]:
    """The records that a prompt would go on from, in any namespace of a tenant."""
    index, out = store.index, set()
    for space in {r.entry.space for r in index.records.values() if r.entry.tenant == tenant}:
        layout = next(r.entry.layout for r in index.records.values() if r.entry.space == space)
        _, found = index.find(space, tokens, layout)
        boundary = longest(found, layout, len(tokens))
        chosen = plan(found, layout, boundary)
        # What gives a tail holds the tail's kept slots as well, but not all that lies before it.
        out |= chosen.records | (ancestors(found, layout, max((s.last for s in chosen.shares), default=0)) or set())
    return out


def pin(store: "ReuseStore", tokens: Tokens, tenant: str, until: float) -> int:
    """Pin what a prompt would go on from; returns how many tokens that is. Notes are written outside the lock."""
    with store.lock:
        records = covering(store, tokens, tenant)
        for record in records:
            record.pinned = until
            store.index.soonest = min(store.index.soonest, record.ends)
        held = max((common(r.entry.tokens, tokens) for r in records), default=0)
    for record in records:
        store.tiers.note(record)
    store.flush()
    return held


def condition(prefix: Tokens | None, tag: str | None, tenant: str | None, key: str | None) -> Callable[[Entry], bool]:
    """Whether all of what was given applies to a record. Raises ConfigError where nothing was given."""
    if prefix is None and tag is None and tenant is None and key is None:
        raise ConfigError("say what to delete: prefix, tag, tenant or key; clear() deletes everything")
    if key == "":
        raise ConfigError("key is empty, and every key begins so; give its first digits as list() shows them")

    def fits(entry: Entry) -> bool:
        return (
            (tag is None or tag in entry.tags)
            and (tenant is None or entry.tenant == tenant)
            and (prefix is None or np.array_equal(entry.tokens[: len(prefix)], prefix))
            and (key is None or entry.key.startswith(key))
        )

    return fits


def delete(store: "ReuseStore", records: set[Record]) -> int:
    """Delete records; what others go on from stays, cut where they part. Inside the lock."""
    count = 0
    for record in sorted(records, key=lambda r: -r.entry.first):  # children before their parents
        if record.key not in store.index.records:
            continue
        survivors = {child for child in record.children if child not in records}
        if survivors:
            _cut(store, record, survivors)
        else:
            store.forget(record)
        count += 1
    return count


def expire(store: "ReuseStore") -> None:
    """Delete what has expired, once all that may go on from it has been looked at. Inside the lock."""
    if store.tiers.remote is None or not store.tiers.remote.looking:
        delete(store, set(store.index.expired()))


def renew(store: "ReuseStore", known: Record, record: Record) -> bool:
    """Let a record that is known take in what was computed once more; whether that is stored now. Inside the lock."""
    if record.extent is None or known.entry.sizes != record.entry.sizes:
        return False
    stored = store.tiers.promote(known, record.extent)
    if known.ends > store.index.now:
        return stored
    # It has expired or was deleted, and still is there for what may go on from it: it lives anew, or it would be lost.
    known.expires, known.pinned = record.expires, -math.inf
    store.index.soonest = min(store.index.soonest, known.ends)
    store.tiers.renewed(known)
    store.counts["inserted"] += 1
    return True


def _cut(store: "ReuseStore", record: Record, survivors: set[Record]) -> None:
    """Put what survivors need of a record in its place."""
    shift = record.entry.layout.shift
    last = max(common(child.entry.tokens, record.entry.tokens) for child in survivors) - shift
    extent = store.tiers.fetch(record) if last > record.entry.first else None
    parents = {parent for parent in record.parents if parent.key in store.index.records}
    if extent is None and record.remote_nbytes and store.index.away:
        store.index.drop(record)  # the server has it and them, and it is cut when that is back
        return
    if extent is None:
        store.forget(record)  # they need nothing of it that could be had
        return
    shorter = extent.cut(min(last, record.entry.last))
    entry = record.entry.cut(shorter)
    for child in survivors:
        record.children.discard(child)
        child.parents.discard(record)
    store.forget(record)
    left = Record(entry, shorter.nbytes, shorter)
    left.expires, left.pinned = (max(getattr(s, name) for s in survivors) for name in ("expires", "pinned"))
    if left.key in store.index.records or store.put(left, parents):
        left = store.index.records[left.key]
        for child in survivors & set(store.index.records.values()):
            child.parents.add(left)
            left.children.add(child)
        return
    for child in survivors:
        store.forget(child)


def verify(store: "ReuseStore") -> tuple[str, ...]:
    """See `ReuseStore.verify`. Inside the lock."""
    wrong = []
    for tier in store.tiers.each:
        try:
            keys = tier.keys()
        except OSError as e:
            wrong.append(str(e))
            continue
        for key in keys:
            try:
                tier.check(key)
            except FileNotFoundError:
                continue
            except (ReuseFileError, OSError) as e:
                wrong.append(str(e))
                if isinstance(e, ReuseFileError):
                    store.tiers.damaged(tier, key, e)
                    if (record := store.index.records.get(key)) is not None:
                        store.tiers.drop(tier, record, e)
    return tuple(wrong)
