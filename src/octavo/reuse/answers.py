"""Whole answers, given again without a model: off unless `ReuseStore(answers=...)` says otherwise.

An answer belongs to a namespace (model, settings, tenant), to all that a call asks for beside its prompt, and to the
prompt's token ids, all of which must be equal; only greedy answers are kept, since others are new each time. With
`similarity` the answer to the most similar prompt is given where its embedding is near enough: that is another
question's answer, so the user sets how near, and is told of each.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import ConfigError
from octavo.reuse.record import Space, Tokens, token_array
from octavo.reuse.terms import at_least_one
from octavo.vdb import VectorDatabase

if TYPE_CHECKING:
    from octavo.reuse.store import ReuseStore

Embed = Callable[[Sequence[int]], Sequence[float]]
OVERHEAD = 1024  # bytes of an answer's objects, of its embedding's key and places
Key = tuple[str, bytes]  # namespace and settings, the prompt's token ids


@dataclass(frozen=True)
class Answered:
    """An answer that was given: to which prompt's tokens, of which prompt it is, and how similar the two are, from -1
    to 1 for equal tokens."""

    prompt: tuple[int, ...]
    matched: tuple[int, ...]
    similarity: float
    answer: tuple[int, ...]


@dataclass(frozen=True)
class AnswerSettings:
    """How whole answers are given again.

    `memory`: bytes for all of them, bookkeeping included; who was asked for longest ago leaves first. `similarity`:
    cosine of two prompts' embeddings, above 0 and at most 1, from which on the answer to another prompt is given; None:
    equal tokens alone. `report` is called with each `Answered`, and must be there with `similarity`. `embed`: token ids
    -> a vector; None: the mean of the model's input embeddings. Raises ConfigError for impossible values.
    """

    memory: int | str = "16MiB"
    similarity: float | None = None
    report: Callable[[Answered], object] | None = None
    embed: Embed | None = None

    def __post_init__(self) -> None:
        at_least_one(self.memory, "memory of answers")
        near = self.similarity
        if near is not None and (isinstance(near, bool) or not isinstance(near, int | float) or not 0 < near <= 1):
            raise ConfigError(f"similarity must be a number above 0 and at most 1, not {near!r}")
        if near is not None and self.report is None:
            raise ConfigError("answers to similar prompts must be reported: give report, a function of octavo.Answered")
        for name in ("report", "embed"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]
    tenant: str
    tags: tuple[str, ...]
    expires: float
    nbytes: int


class Answers:
    """The answers of a store."""

    def __init__(self, store: "ReuseStore", settings: AnswerSettings) -> None:
        self.store, self.settings = store, settings
        self.budget = at_least_one(settings.memory, "memory of answers")
        self.nbytes = self.given = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, _Answer] = OrderedDict()  # who was asked for last is the last
        self._vectors: dict[str, VectorDatabase] = {}

    def find(self, identity: Mapping[str, Any], asked: str, prompt: Any, embed: Embed) -> tuple[int, ...] | None:
        """The answer to a prompt; `asked` says all that decides it beside the model and the prompt. None: unknown."""
        ids, space = token_array(prompt), self._space(identity, asked)
        key, near = (space, ids.tobytes()), self.settings.similarity
        vector: Any = None if near is None else self._vector(ids, embed)
        similarity = 1.0
        with self._lock:
            found = self._live(key)
            if found is None and near is not None and space in self._vectors:
                hits = self._vectors[space].search(vector, k=1)
                key, similarity = (space, bytes.fromhex(str(hits.ids[0]))), 1 - float(hits.distances[0])
                found = self._live(key) if similarity >= near else None
            if found is None:
                return None
            self.given += 1
            self._kept.move_to_end(key)
        if self.settings.report is not None:
            matched = np.frombuffer(key[1], np.int32)
            self.settings.report(Answered(tuple(ids.tolist()), tuple(matched.tolist()), similarity, found.tokens))
        return found.tokens

    def keep(self, identity: Mapping[str, Any], asked: str, prompt: Any, answer: Sequence[int], embed: Embed) -> None:
        """Keep an answer, after others have left for it; one that is larger than the budget is not kept."""
        ids, terms = token_array(prompt), self.store._terms.get()
        space = self._space(identity, asked)
        key, vector = (space, ids.tobytes()), None
        nbytes = 5 * ids.nbytes + 8 * len(answer) + OVERHEAD  # the key of an embedding has two digits a byte
        if self.settings.similarity is not None:
            vector = self._vector(ids, embed)
            nbytes += vector.nbytes
        expires = self.store.clock() + terms.ttl
        new = _Answer(tuple(map(int, answer)), terms.tenant, terms.tags, expires, nbytes)
        with self._lock:
            self._drop(key)
            if nbytes > self.budget:
                return
            while self.nbytes + nbytes > self.budget:
                self._drop(next(iter(self._kept)))
            self._kept[key] = new
            self.nbytes += nbytes
            if vector is not None:
                if space not in self._vectors:
                    self._vectors[space] = VectorDatabase(len(vector), metric="cosine")
                self._vectors[space].add(vector, ids=key[1].hex())

    def delete(self, prefix: Tokens | None, tag: str | None, tenant: str | None) -> None:
        """Forget the answers that all of what was given applies to."""
        begins = b"" if prefix is None else prefix.tobytes()
        with self._lock:
            for key, each in list(self._kept.items()):
                named = (tag is None or tag in each.tags) and (tenant is None or tenant == each.tenant)
                if named and key[1].startswith(begins):
                    self._drop(key)

    def __len__(self) -> int:
        return len(self._kept)

    def _space(self, identity: Mapping[str, Any], asked: str) -> str:
        return Space({**identity, "asked": asked}, self.store._terms.get().tenant).name

    def _vector(self, ids: Tokens, embed: Embed) -> Any:
        return np.ascontiguousarray((self.settings.embed or embed)(ids.tolist()), dtype=np.float32)

    def _live(self, key: Key) -> _Answer | None:
        found = self._kept.get(key)
        if found is not None and found.expires <= self.store.clock():
            self._drop(key)
            return None
        return found

    def _drop(self, key: Key) -> None:
        gone = self._kept.pop(key, None)
        if gone is None:
            return
        self.nbytes -= gone.nbytes
        vectors = self._vectors.get(key[0])
        if vectors is not None:
            vectors.remove(key[1].hex())
            if not len(vectors):
                del self._vectors[key[0]]


def kept(store: "ReuseStore", settings: bool | AnswerSettings) -> Answers | None:
    """The answers of a store that was asked for them. Raises ConfigError for what asks for none and is not False."""
    if not isinstance(settings, bool | AnswerSettings):
        raise ConfigError(f"answers must be True, False or octavo.AnswerSettings, not {settings!r}")
    chosen = AnswerSettings() if settings is True else settings
    return Answers(store, chosen) if isinstance(chosen, AnswerSettings) else None
