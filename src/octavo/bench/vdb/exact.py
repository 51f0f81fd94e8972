"""Every row read: one query at a time and in batches, beside the streaming read of the same bytes."""

from collections.abc import Callable, Sequence
from typing import Any

from octavo.bench.vdb.data import Floats, Truth, Vectors
from octavo.bench.vdb.engines import STREAM, Engine, make, offers, stream
from octavo.bench.vdb.timing import Measurement, alternate, blas_threads, rate

SAMPLE_AIM = 0.2  # seconds that one sample takes at least


def measure(
    vectors: Vectors,
    k: int,
    batches: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    storages: Sequence[str],
    budget: float,
    aim: float = SAMPLE_AIM,
) -> tuple[list[Measurement], dict[str, str]]:
    """Queries per second of every engine that fits into `budget` bytes, and why others were left out.

    Rows and queries must have length 1, so that all metrics agree. A batch of 1 is one query at a time. Facts of an
    engine: `recall` over all queries of the batch (ten single ones), and of Octavo's `overhead`, the bytes per vector
    beyond the vectors and codes. The streaming read tells its `reader`.
    """
    x, queries = vectors.rows, vectors.queries
    engines, left_out = make(offers(storages), x, k, budget)
    truth = Truth(vectors, k)
    measured = []
    for count in threads:
        with blas_threads(count):
            for engine in engines:
                engine.prepare(count)
            for batch in batches:
                case = {"data": vectors.name, "rows": len(x), "dims": x.shape[1], "k": k, "batch": batch}
                case["threads"] = count
                asked = [queries[i : i + batch] for i in range(0, len(queries) - batch + 1, batch)]
                measured += _case(case, engines, asked, x, truth, rounds, aim)
    return measured, left_out


def _case(
    case: dict[str, Any],
    engines: list[Engine],
    asked: list[Floats],
    x: Floats,
    truth: Truth,
    rounds: int,
    aim: float,
) -> list[Measurement]:
    threads = case["threads"]
    usual = [e for e in engines if case["batch"] > 1 or e.name != "faiss, BLAS"]
    reader = stream(x, threads, aim / 10)
    facts = {STREAM: reader.facts} | {e.name: _facts(e, asked, truth, threads) for e in usual}
    running = [reader, *usual]
    tasks = {e.name: _task(e, asked, threads, aim) for e in running}
    samples = alternate(tasks, rounds)
    # a stream is one pass over the rows, which serves one query
    per_call = {e.name: 1 if e.name == STREAM else case["batch"] for e in running}
    return [
        Measurement("exact", case, name, "queries/s", [s * per_call[name] for s in found], facts[name])
        for name, found in samples.items()
    ]


def _task(engine: Engine, asked: list[Floats], threads: int, aim: float) -> Callable[[], float]:
    search = engine.search
    return rate(lambda number: search(asked[number % len(asked)], threads), aim)


def _facts(engine: Engine, asked: list[Floats], truth: Truth, threads: int) -> dict[str, Any]:
    batch = len(asked[0])
    some = asked[: 10 if batch == 1 else 1]
    recalls = [truth.recall(engine.search(q, threads), i * batch) for i, q in enumerate(some)]
    facts = {**engine.facts, "recall": sum(recalls) / len(recalls)}
    if engine.database is not None:
        held = engine.database.info()
        facts["overhead"] = (held.bytes - held.vector_bytes) / held.count
    return facts
