"""How a prompt is put together from what is stored, as long as loading that is faster than computing it."""

from collections import Counter
from typing import TYPE_CHECKING

from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.cover import NOTHING, Plan, longest, plan
from octavo.reuse.record import Tokens

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore


def planned(store: "ReuseStore", space: str, tokens: Tokens, layout: SnapshotLayout) -> tuple[int, Plan]:
    """(tokens that records agree with, how the longest prefix is put together); loads nothing. Inside the lock."""
    index, shortest = store.index, store.keeping.shortest
    if len(tokens) < shortest:
        return 0, NOTHING
    matched, found = index.find(space, tokens, layout)
    boundary = longest(found, layout, len(tokens) - 1)
    if boundary < shortest:
        return matched, NOTHING
    chosen = plan(found, layout, boundary)
    if not loads(chosen):
        return matched, chosen
    held = index.find(space, tokens, layout, lambda r: r.extent is not None)[1]
    within = longest(held, layout, len(tokens) - 1)
    if store.costs.worth_loading(space, loads(chosen), boundary - within):
        return matched, chosen
    store.counts["passed_over"] += 1
    if "remote" in loads(chosen):  # the folder may be faster than the server
        near = index.find(space, tokens, layout, lambda r: r.extent is not None or r.path is not None)[1]
        boundary = longest(near, layout, len(tokens) - 1)
        chosen = plan(near, layout, boundary)
        if boundary > within and store.costs.worth_loading(space, loads(chosen), boundary - within):
            return matched, chosen
    return matched, plan(held, layout, within)


def loads(chosen: Plan) -> Counter[str]:
    """Bytes that a plan loads from each tier."""
    out: Counter[str] = Counter()
    for record in chosen.records:
        if record.extent is None:
            near = record.path is not None
            out["disk" if near else "remote"] += record.file_nbytes if near else record.remote_nbytes
    return out
