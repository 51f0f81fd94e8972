"""Similar prompts: what of a prompt other prompts have computed elsewhere, in another place and context.

This is approximate, and off unless `ReuseStore(similar=...)` says otherwise. The embedding of every stored prompt lies
in a `vdb` index of its namespace, so nothing of one tenant is ever found by another. Embeddings only nominate stored
prompts; token ids decide (`octavo.reuse.align`). What is approximated: the keys and values of a run were computed after
other tokens than those that stand before it now. Its first tokens, which depend most on what stands before, are
computed anew, and so is all that no run covers (LegoLink, arXiv 2410.12876); the last token always is.

Under eviction a slot that the other prompt has evicted stays evicted. A token whose marked slots a computed token must
see is taken only where they are still held, which is around some boundaries; all others are computed.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.errors import ConfigError
from octavo.kv.extent import Extent
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.align import Run, align
from octavo.reuse.cover import longest, reach
from octavo.reuse.draft import Coverage, Draft, put_together
from octavo.reuse.record import Record, Space, Tokens, token_array
from octavo.vdb import VectorDatabase

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore

Embed = Callable[[Sequence[int]], Sequence[float]]
EMBEDDED = 256  # bytes of an embedding beside its numbers: its key, and its places in two indices
RECENT = 8  # audits whose mean decides
LOOKED_INTO = 32  # prompts by which `ReuseStore.explain` judges, which has no embeddings


@dataclass(frozen=True)
class SimilarSettings:
    """How similar prompts are used.

    `embed`: token ids -> a vector, the same length each time; None: the mean of the model's input embeddings.
    `nominated`: stored prompts that are looked into. `least`: tokens of a run. `first`: tokens of each run that are
    computed anew. `last`: tokens of the prompt's end that are computed anew, since a question after a document is read
    in the light of the instruction before it. `deviating`: share of the other tokens of runs that are computed too,
    those whose values in the second layer differ most from what is stored (CacheBlend, arXiv 2405.16444); it costs two
    layers of all tokens, and means nothing under eviction. `most`: share of a prompt that may have to be computed; more
    is computed in full. `audit`: share of these requests that are computed in full as well, to see how far the next
    token's distribution is off; `limit`: the mean KL, in nats, of the last audits above which the mode turns itself
    off.

    Raises ConfigError for impossible values.
    """

    embed: Embed | None = None
    nominated: int = 4
    least: int = 32
    first: int = 32
    last: int = 32
    deviating: float = 0.0
    most: float = 0.5
    audit: float = 0.02
    limit: float = 0.1

    def __post_init__(self) -> None:
        for name, low in (("nominated", 1), ("least", 2), ("first", 0), ("last", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be a whole number of at least {low}, not {value!r}")
        for name in ("deviating", "most", "audit", "limit"):
            value, top = getattr(self, name), float("inf") if name == "limit" else 1.0
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= top:
                raise ConfigError(f"{name} must be a number from 0 to {top:g}, not {value!r}")
        if self.embed is not None and not callable(self.embed):
            raise ConfigError(f"embed must be a function of token ids, not {self.embed!r}")


class Taken(NamedTuple):
    """Slots of positions `first` up to `last` of an extent, `by` positions further on in the new prompt. `marked`: the
    marked ones too; `exact`: they stand after the same tokens as before."""

    extent: Extent
    first: int
    last: int
    by: int
    marked: bool
    exact: bool


class SimilarReading:
    """A prompt that was put together from similar ones: approximate, so nothing of it is ever stored."""

    similar = True

    def __init__(self, identity: Mapping[str, Any], boundary: int) -> None:
        self.identity, self.boundary = identity, boundary

    def insert(self, cache: object, which: int = 0, tokens: object = None) -> bool:
        """False: nothing is stored."""
        return False

    def close(self) -> None:
        """Nothing is held."""


class Similar:
    """The similar prompts of a store."""

    def __init__(self, store: "ReuseStore", settings: SimilarSettings) -> None:
        self.store, self.settings = store, settings
        self.off = False
        self._lock = threading.Lock()
        self._vectors: dict[str, VectorDatabase] = {}  # by namespace
        self._news: dict[str, dict[str, Record]] = {}  # by namespace and key: who came since it was looked at
        self._dice = random.Random(0)
        self._audits: deque[float] = deque(maxlen=RECENT)
        self._audited: list[float] = [0, 0.0]  # how many, and the sum of their KL
        store.index.watch = self._note

    def draft(self, identity: Mapping[str, Any], layout: SnapshotLayout, prompt: Any, embed: Embed) -> Draft | None:
        """How similar prompts help with one; None: too little, or not at all. `embed` is used where no other is set."""
        ids, space = token_array(prompt), Space(identity, self.store._terms.get().tenant).name
        if not self._suits(identity, layout, ids, 0):
            return None
        with self.store.lock:
            self.store._look()
            found = self.store.index.find(space, ids, layout)[1]
            exact = longest(found, layout, len(ids) - 1)
        if not self._suits(identity, layout, ids, exact):
            return None
        near = self._nominated(space, ids, self.settings.embed or embed)
        return self._drafted(space, ids, layout, near, exact)

    def helps(self, space: str, ids: Tokens, layout: SnapshotLayout, exact: int) -> int:
        """How many tokens would not be computed if embeddings nominate the right ones of the prompts that were used
        last; 0: similar prompts would not be used. Inside the store's lock."""
        records = [r for r in self.store.index.records.values() if r.entry.space == space]
        if not records or not self._suits(records[0].entry.identity, layout, ids, exact):
            return 0
        last = sorted(records, key=lambda r: -r.order)[:LOOKED_INTO]
        draft = self._drafted(space, ids, layout, [r.key for r in last], exact)
        return 0 if draft is None else draft.reused

    def _suits(self, identity: Mapping[str, Any], layout: SnapshotLayout, ids: Tokens, exact: int) -> bool:
        if identity.get(
            "swiftkv_before"
        ):  # what a token handed on need not come before the token that stands there now
            return False
        if self.off or layout.shift or not layout.dtype.is_floating_point or layout.dtype.itemsize < 2:
            return False
        return len(ids) - 1 - exact >= max(self.settings.least, self.store.shortest)

    def _drafted(self, space: str, ids: Tokens, layout: SnapshotLayout, near: list[str], exact: int) -> Draft | None:
        store, settings, limit = self.store, self.settings, len(ids) - 1
        with store.lock:
            records = [store.index.records[key] for key in near if key in store.index.records]
            found = store.index.find(space, ids, layout)[1]
            fixed = min(reach(found), limit)
            sources = [ids, *(r.entry.tokens for r in records)]
            runs = [Run(0, 0, 0, fixed)] if fixed else []
            for run in align(ids[: limit - settings.last], sources[1:], settings.least, fixed):
                skipped = min(settings.first, run.length)
                runs.append(Run(run.at + skipped, run.source + 1, run.first + skipped, run.length - skipped))
            held = [Coverage(store.index.find(space, source, layout)[1], len(source)) for source in sources]
            draft = put_together(ids, runs, held, layout.window, fixed)
            if draft.reused - exact < store.shortest or len(draft.computed) > settings.most * limit:
                return None
            return draft

    def take(self, draft: Draft) -> list[Taken] | None:
        """The slots that a draft needs; None where a file turns out to be damaged."""
        store, lent = self.store, draft.lent
        records = {piece.record for piece in lent}
        with store.lock:
            for record in records:
                record.users += 1
        try:
            extents = {record: store.tiers.fetch(record) for record in records}
        finally:
            with store.lock:
                for record in records:
                    record.users -= 1
                    store.index.used(record)
        out = []
        for piece in lent:
            extent = extents[piece.record]
            if extent is None:
                return None
            out.append(Taken(extent, piece.first, piece.last, piece.by, piece.marked, piece.exact))
        return out

    def reading(self, identity: Mapping[str, Any], boundary: int) -> SimilarReading:
        """What stands for a request whose first `boundary` tokens were put together."""
        return SimilarReading(identity, boundary)

    def count(self, asked: int, reused: int) -> None:
        """Take note of a request that similar prompts helped with."""
        with self.store.lock:
            self.store.counts.update(requests=1, asked=asked, similar_hits=1, similar_tokens=reused)

    # Audits

    def due(self) -> bool:
        """Whether this request is one of those that are computed in full, too."""
        with self._lock:
            return self._dice.random() < self.settings.audit

    def audited(self, kl: float) -> None:
        """Take note of how far a request was off; above the limit the mode turns itself off, with a warning."""
        with self._lock:
            self._audits.append(kl)
            self._audited[0] += 1
            self._audited[1] += kl
            mean = sum(self._audits) / len(self._audits)
            self.off = self.off or not mean <= self.settings.limit
        with self.store.lock:
            self.store.counts["similar_audits"] += 1
        if self.off:
            limit = self.settings.limit
            self.store.warn("similar", f"similar prompts are off: the audits' mean KL is {mean:.3g}, above {limit:g}")

    @property
    def mean_kl(self) -> float:
        """Of all audits, 0 where there was none."""
        with self._lock:
            count, total = self._audited
            return total / count if count else 0.0

    # Embeddings

    def _nominated(self, space: str, ids: Tokens, embed: Embed) -> list[str]:
        """Keys of the records whose prompts are nearest, the nearest first."""
        self._follow(space, embed)
        with self._lock:
            if space not in self._vectors or not len(self._vectors[space]):
                return []
            hits = self._vectors[space].search(_vector(embed, ids), k=self.settings.nominated)
            return [str(key) for key in hits.ids]

    def _note(self, record: Record) -> None:
        """Take note of a record that came or went; inside the store's lock."""
        with self._lock:
            space, key = record.entry.space, record.key
            if not record.gone:
                self._news.setdefault(space, {})[key] = record
                return
            # Nothing of it stays: its bytes are not counted any more, and nobody may ever look at this namespace again.
            news, vectors = self._news.get(space, {}), self._vectors.get(space)
            if news.pop(key, None) is not None and not news:
                del self._news[space]
            if vectors is not None and key in vectors:
                vectors.remove(key)
                if not len(vectors):
                    del self._vectors[space]

    def _follow(self, space: str, embed: Embed) -> None:
        """Let the index of a namespace hold what the store holds, whoever has stored or deleted it."""
        with self._lock:
            news = self._news.pop(space, {})
        for key, record in news.items():
            vector = _vector(embed, record.entry.tokens)
            with self.store.lock:  # the budget holds embeddings too
                fits = self.store.index.weigh(record, vector.nbytes + EMBEDDED)
            with self._lock:
                vectors = self._vectors.get(space)
                if not fits or record.gone:
                    continue
                if vectors is None:
                    vectors = self._vectors[space] = VectorDatabase(len(vector), metric="cosine")
                vectors.add(vector, ids=key)


def made(store: "ReuseStore", settings: bool | SimilarSettings) -> Similar | None:
    """The similar prompts that a store was asked for. Raises ConfigError for what asks for none and is not False."""
    if not isinstance(settings, bool | SimilarSettings):
        raise ConfigError(f"similar must be True, False or octavo.SimilarSettings, not {settings!r}")
    chosen = SimilarSettings() if settings is True else settings
    return Similar(store, chosen) if isinstance(chosen, SimilarSettings) else None


def _vector(embed: Embed, ids: Tokens) -> NDArray[np.float32]:
    vector = np.ascontiguousarray(embed(ids.tolist()), dtype=np.float32)
    if vector.ndim != 1 or not len(vector):
        raise ConfigError(f"embed must give one row of numbers, not an array of shape {list(vector.shape)}")
    return vector
