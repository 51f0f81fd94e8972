"""A LangChain vector store over `VectorDatabase`. Needs `pip install octavo[langchain]`.

    store = OctavoVectorStore.from_texts(texts, embedding, metadatas=metadatas, index="hnsw")
    store.similarity_search("a question", k=4, filter={"lang": "en"})
    store.save_local("x.vdb")
    store = OctavoVectorStore.load_local("x.vdb", embedding)

A row's id is the document's; its text and metadata are kept as JSON (see `rows`), so tuples come back as lists and keys
as text. Files are those of `octavo vdb`. No file knows its embedding: load it with the one that filled it.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any, Literal, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from octavo.errors import ConfigError, UnknownIdError
from octavo.vdb import VDBMetric, VectorDatabase
from octavo.vdb.rows import Payload, pack, unpack

Filter = dict[str, Any] | Callable[[Document], bool]
_WIDEN = 8  # times as many rows are looked at while a filter has left too few


class OctavoVectorStore(VectorStore):  # type: ignore[misc,unused-ignore]  # Any where LangChain is not installed
    """Documents found by their nearest vectors.

    `embedding` makes the vectors; the first ones set the dimensions, unless there is a `database` already. `metric`,
    `storage`, `index` and whatever else `settings` has are those of `VectorDatabase`. Scores are its distances: smaller
    is nearer. Errors are those of `VectorDatabase`, and ConfigError for metadata that JSON cannot hold.
    """

    def __init__(
        self,
        embedding: Embeddings,
        database: VectorDatabase | None = None,
        *,
        metric: Literal["cosine", "euclidean", "dot"] = "cosine",
        relevance_score_fn: Callable[[float], float] | None = None,
        **settings: Any,
    ) -> None:
        VectorDatabase(1, metric=metric, **settings)  # a mistake shows now, not at the first text
        self.embedding = embedding
        self.database = database
        self._settings = {"metric": metric, **settings}
        self._relevance = relevance_score_fn
        self._making = threading.Lock()

    @property
    def embeddings(self) -> Embeddings:
        """What makes the vectors."""
        return self.embedding

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts, all or none, and return their ids; a text takes the place of one with its id.

        A missing id is made up. Of texts with the same id the last stays.
        """
        texts = list(texts)
        metadatas = metadatas or [{} for _ in texts]
        names = [name or str(uuid.uuid4()) for name in ids or [None] * len(texts)]
        if not len(texts) == len(metadatas) == len(names):
            raise ConfigError(f"{len(texts)} texts, {len(metadatas)} metadatas and {len(names)} ids; give one for each")
        packed = [pack(Payload(text, None, metadata)) for text, metadata in zip(texts, metadatas, strict=True)]
        if not texts:
            return []
        vectors = self.embedding.embed_documents(texts)
        last = list({name: row for row, name in enumerate(names)}.values())
        self._database(len(vectors[0])).add(
            [vectors[row] for row in last],
            ids=[names[row] for row in last],
            metadata=[packed[row] for row in last],
            replace=True,
        )
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Remove documents by id, or all of them; ids that are not there are passed over."""
        if self.database is None:
            return True
        if ids is None:
            self.database.remove(filter={})
        for name in ids or ():
            try:
                self.database.remove(name)
            except UnknownIdError:
                continue
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents that are there, in the order of the ids."""
        found: list[Document] = []
        if self.database is None:
            return found
        for name in ids:
            try:
                row = self.database.get(id=name)
            except UnknownIdError:
                continue
            found.append(_document(row.id, row.metadata))
        return found

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k nearest documents to a text. Arguments as for `similarity_search_with_score_by_vector`."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The k nearest documents to a text with their distances, nearest first."""
        return self.similarity_search_with_score_by_vector(self.embedding.embed_query(query), k, **kwargs)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The k nearest documents to a vector [D]."""
        return [document for document, _ in self.similarity_search_with_score_by_vector(embedding, k, **kwargs)]

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, filter: Filter | None = None, exact: bool = False
    ) -> list[tuple[Document, float]]:
        """The k nearest documents to a vector [D] with their distances, nearest first.

        filter: {"key": value} keeps documents whose metadata has each of these, a function those it is true for; it is
        asked in order of distance until k are found. exact=True reads every row although there is a graph.
        """
        return [(document, distance) for document, distance, _ in self._nearest(embedding, k, filter, exact)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """k of the fetch_k nearest documents to a text, chosen to be near it and unlike each other.

        lambda_mult: from 0, as unlike as can be, to 1, the nearest (Carbonell and Goldstein, SIGIR 1998).
        """
        vector = self.embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        exact: bool = False,
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, for a vector [D]."""
        import numpy as np
        from langchain_core.vectorstores.utils import maximal_marginal_relevance

        found = self._nearest(embedding, fetch_k, filter, exact)
        if self.database is None or not found:
            return []
        vectors = [self.database.get(index=index).vector.tolist() for _, _, index in found]
        chosen = maximal_marginal_relevance(np.array(embedding, dtype=np.float32), vectors, lambda_mult, k)
        return [found[place][0] for place in chosen]

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store filled with texts; `kwargs` are those of the constructor."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def save_local(self, path: str | PathLike[str]) -> None:
        """Write the database to a file: whole or not at all. Raises ConfigError before the first text."""
        if self.database is None:
            raise ConfigError("there is nothing to save: the first text that is added sets the dimensions")
        self.database.save(path)

    @classmethod
    def load_local(
        cls, path: str | PathLike[str], embedding: Embeddings, mode: Literal["read", "mmap"] = "read", **kwargs: Any
    ) -> Self:
        """A store over a saved database; mode "mmap" opens at once and is read-only. Raises DatabaseFileError."""
        return cls(embedding, VectorDatabase.open(path, mode=mode), **kwargs)

    def _database(self, dimensions: int) -> VectorDatabase:
        with self._making:
            if self.database is None:
                self.database = VectorDatabase(dimensions, **self._settings)
            return self.database

    def _nearest(
        self, embedding: list[float], k: int, filter: Filter | None, exact: bool
    ) -> list[tuple[Document, float, int]]:
        """(document, distance, index) of the nearest rows that the filter keeps."""
        if self.database is None:
            return []
        keep = _predicate(filter)
        width = k
        while True:
            hits = self.database.search(embedding, k=width, exact=exact or width > k, with_metadata=True)
            found = [(_document(h["id"], h["metadata"]), h["distance"], h["index"]) for h in hits]
            kept = [row for row in found if keep(row[0])]
            if len(kept) >= k or len(found) < width:
                return kept[:k]
            width *= _WIDEN

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """From 1, the same, down to 0: LangChain's own formulas for each metric, kept within the two."""
        if self._relevance is not None:
            return self._relevance
        metric = VDBMetric.COSINE if self.database is None else self.database.metric
        if metric == VDBMetric.EUCLIDEAN:
            return lambda distance: _within(self._euclidean_relevance_score_fn(distance))
        if metric == VDBMetric.COSINE:
            return lambda distance: _within(self._cosine_relevance_score_fn(distance))
        return lambda distance: _within(-distance)


def _document(name: str | None, metadata: bytes | dict[str, Any] | None) -> Document:
    payload = unpack(metadata)
    return Document(id=name, page_content=payload.text or "", metadata=payload.metadata)


def _predicate(filter: Filter | None) -> Callable[[Document], bool]:
    if filter is None:
        return lambda document: True
    if callable(filter):
        return filter
    if isinstance(filter, dict):
        wanted = filter.items()
        return lambda document: all(key in document.metadata and document.metadata[key] == v for key, v in wanted)
    raise ConfigError(f"filter must be a dict of metadata or a function of a Document, not {type(filter).__name__}")


def _within(score: float) -> float:
    return min(1.0, max(0.0, score))
