"""LangChain's own standard tests, and what they do not ask: filters, scores, files, relevance."""

import pytest

pytest.importorskip("langchain_core")
standard = pytest.importorskip("langchain_tests.integration_tests")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import Embeddings  # noqa: E402

from octavo.errors import ConfigError, DatabaseFileError, ReadOnlyDatabaseError  # noqa: E402
from octavo.vdb import VectorDatabase  # noqa: E402
from octavo.vdb.langchain import OctavoVectorStore  # noqa: E402

# The plain tests beside the asynchronous ones are marked too, and pytest-asyncio says so.
MARKS = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:.*but it is not an async function:pytest.PytestWarning"),
]


class TestFlat(standard.VectorStoreIntegrationTests):
    pytestmark = MARKS

    @pytest.fixture
    def vectorstore(self):
        return OctavoVectorStore(self.get_embeddings())


class TestGraph(standard.VectorStoreIntegrationTests):
    pytestmark = MARKS

    @pytest.fixture
    def vectorstore(self):
        return OctavoVectorStore(self.get_embeddings(), metric="euclidean", storage="f32+i8", index="hnsw")


class Circle(Embeddings):
    """The text is an angle in degrees."""

    def embed_query(self, text):
        from math import cos, radians, sin

        return [cos(radians(float(text))), sin(radians(float(text)))]

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def store():
    angles = range(0, 180, 2)
    return OctavoVectorStore.from_texts(
        [str(a) for a in angles],
        Circle(),
        [{"angle": a, "third": a % 3} for a in angles],
        ids=[f"d{a}" for a in angles],
    )


def texts(documents):
    return [document.page_content for document in documents]


def test_filters_keep_the_nearest_that_match(store):
    assert texts(store.similarity_search("9.5", k=3)) == ["10", "8", "12"]
    assert texts(store.similarity_search("9.5", k=3, filter={"third": 0})) == ["12", "6", "18"]
    assert texts(store.similarity_search("0", k=2, filter=lambda d: d.metadata["angle"] > 150)) == ["152", "154"]
    assert texts(store.similarity_search("0", k=2, filter={"angle": 178, "third": 1})) == ["178"]
    assert store.similarity_search("0", filter={"nothing": None}) == []
    with pytest.raises(ConfigError, match="filter must be"):
        store.similarity_search("0", filter="third")


def test_scores_are_distances_and_relevance_is_within_0_and_1(store):
    (nearest, distance), *_ = store.similarity_search_with_score("60", k=1)
    assert nearest.id == "d60"
    assert distance == pytest.approx(0, abs=1e-6)
    relevance = [score for _, score in store.similarity_search_with_relevance_scores("60", k=90)]
    assert relevance == sorted(relevance, reverse=True)
    assert relevance[0] == pytest.approx(1, abs=1e-6)
    assert relevance[-1] == 0  # beyond a right angle
    assert len(store.similarity_search_with_relevance_scores("60", k=90, score_threshold=0.99)) == 9
    for metric in ("euclidean", "dot"):
        other = OctavoVectorStore.from_texts(["0", "60", "179"], Circle(), metric=metric)
        scores = [score for _, score in other.similarity_search_with_relevance_scores("0", k=3)]
        assert scores[0] == pytest.approx(1)
        assert scores[2] == 0
    custom = OctavoVectorStore.from_texts(["0"], Circle(), relevance_score_fn=lambda distance: 0.25)
    assert custom.similarity_search_with_relevance_scores("0")[0][1] == 0.25


def test_marginal_relevance_spreads(store):
    assert texts(store.max_marginal_relevance_search("59.5", k=3, fetch_k=9, lambda_mult=1)) == ["60", "58", "62"]
    spread = texts(store.max_marginal_relevance_search("60", k=3, fetch_k=9, lambda_mult=0.1))
    assert spread[0] == "60"
    assert set(spread[1:]) == {"52", "68"}
    kept = store.max_marginal_relevance_search("60", k=2, fetch_k=9, filter={"third": 1})
    assert all(document.metadata["third"] == 1 for document in kept)
    assert OctavoVectorStore(Circle()).max_marginal_relevance_search("1") == []


def test_retrievers_ask_in_every_way(store):
    assert texts(store.as_retriever(search_kwargs={"k": 1}).invoke("90")) == ["90"]
    assert texts(store.as_retriever(search_type="mmr", search_kwargs={"k": 1}).invoke("90")) == ["90"]
    threshold = {"k": 4, "score_threshold": 0.9999}
    assert texts(
        store.as_retriever(search_type="similarity_score_threshold", search_kwargs=threshold).invoke("90")
    ) == ["90"]


def test_a_saved_store_is_loaded(store, tmp_path):
    store.add_documents([Document("7", metadata={"nested": {"é": [1, None]}}, id="odd")])
    store.save_local(tmp_path / "x.vdb")
    loaded = OctavoVectorStore.load_local(tmp_path / "x.vdb", Circle())
    assert loaded.get_by_ids(["odd"]) == store.get_by_ids(["odd"])
    assert loaded.similarity_search("33", k=5) == store.similarity_search("33", k=5)
    loaded.add_texts(["33"], ids=["new"])
    assert loaded.similarity_search("33", k=1)[0].id == "new"
    view = OctavoVectorStore.load_local(str(tmp_path / "x.vdb"), Circle(), mode="mmap")
    assert view.similarity_search("33", k=5) == store.similarity_search("33", k=5)
    with pytest.raises(ReadOnlyDatabaseError):
        view.add_texts(["1"])
    with pytest.raises(DatabaseFileError):
        OctavoVectorStore.load_local(tmp_path / "none.vdb", Circle())
    with pytest.raises(ConfigError, match="nothing to save"):
        OctavoVectorStore(Circle()).save_local(tmp_path / "y.vdb")


def test_ids_are_unique_and_delete_takes_all_or_some(store):
    assert store.add_texts(["1", "2"], ids=["twice", "twice"]) == ["twice", "twice"]
    assert texts(store.get_by_ids(["twice", "none"])) == ["2"]
    made = store.add_texts(["3", "4"], ids=[None, "named"])
    assert made[1] == "named"
    assert len(made[0]) == 36
    assert store.delete(["named", "none"])
    assert store.get_by_ids(["named"]) == []
    assert store.delete()
    assert len(store.database) == 0
    assert store.add_texts([]) == []


def test_mistakes_change_nothing(store):
    before = len(store.database)
    with pytest.raises(ConfigError, match="one for each"):
        store.add_texts(["1", "2"], ids=["one"])
    with pytest.raises(ConfigError, match="JSON"):
        store.add_texts(["1", "2"], [{}, {"when": object()}])
    with pytest.raises(ConfigError, match="metric"):
        OctavoVectorStore(Circle(), metric="taxicab")
    assert len(store.database) == before


def test_rows_of_other_programs_are_documents_too():
    db = VectorDatabase(2)
    db.add([[1, 0], [0, 1]], ids=["raw", None], metadata=[b"plain bytes", None])
    store = OctavoVectorStore(Circle(), db)
    found = store.similarity_search("0", k=2)
    assert texts(found) == ["plain bytes", ""]
    assert [document.id for document in found] == ["raw", None]
    assert store.embeddings is store.embedding
