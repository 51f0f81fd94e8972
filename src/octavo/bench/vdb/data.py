"""Vectors to search, the true answers, and how much of them an engine found."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.errors import TextFileError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
HELD_OUT = 1000  # rows at the end of a file that become queries
_BLOCK = 20_000  # rows that are in float64 at a time


class Vectors(NamedTuple):
    """Rows [n, d] and queries [q, d], float32, C-contiguous."""

    name: str
    rows: Floats
    queries: Floats


def random_directions(rows: int, dimensions: int, queries: int) -> Vectors:
    """Independent directions, of length 1: no structure to exploit, and the smallest gaps between neighbours."""
    draw = np.random.default_rng(1)
    x = np.empty((rows, dimensions), np.float32)
    for start in range(0, rows, _BLOCK):
        x[start : start + _BLOCK] = draw.standard_normal((min(_BLOCK, rows - start), dimensions), np.float32)
    q = draw.standard_normal((queries, dimensions), np.float32)
    return Vectors("random", normalised(x), normalised(q))


def clusters(rows: int, dimensions: int, queries: int) -> Vectors:
    """Gaussian clouds around 1,000 centres: what a graph meets where there are no embeddings at hand."""
    draw = np.random.default_rng(7)
    x = draw.standard_normal((1000, dimensions), np.float32)[draw.integers(0, 1000, rows + queries)]
    x += 0.5 * draw.standard_normal(x.shape, np.float32)
    return Vectors("clusters", x[:rows].copy(), x[rows:].copy())


def from_file(path: Path, rows: int | None = None, queries: int = HELD_OUT) -> Vectors:
    """Rows of a .npy file [n, d]; queries are the last ones, at most 1,000 and at most half of them.

    Raises TextFileError if the file cannot be read or is not such an array.
    """
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TextFileError(f"cannot read {path} as a .npy file: {error}") from error
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating) or len(x) < 2:
        raise TextFileError(f"{path} must hold floats [rows, dimensions], not {x.dtype} {list(x.shape)}")
    rest = max(len(x) - HELD_OUT, len(x) - len(x) // 2)
    held_out = np.array(x[rest:][:queries], np.float32)
    return Vectors(path.name, np.array(x[: min(rows or rest, rest)], np.float32), held_out)


def normalised(x: Floats) -> Floats:
    """Rows of length 1, in place; zero rows stay."""
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        block /= np.where(lengths == 0, 1, lengths)
    return x


class Truth:
    """The k nearest rows of each query by float64, and the recall of others against them.

    A row counts as found if its true score is at least that of the k-th nearest, less a float32 rounding: rows that
    tie there are equally right.
    """

    def __init__(self, vectors: Vectors, k: int, euclidean: bool = False) -> None:
        self._rows, self._euclidean = vectors.rows, euclidean
        self._queries = vectors.queries.astype(np.float64)
        best = np.empty((len(self._queries), 0))
        for start in range(0, len(self._rows), _BLOCK):
            scores = self._scores(self._rows[start : start + _BLOCK].astype(np.float64))
            scores = np.concatenate([best, scores], axis=1)
            best = np.partition(scores, -min(k, scores.shape[1]), axis=1)[:, -k:]
        self._kth = best.min(axis=1, keepdims=True)  # [queries, 1]
        self._slack = 1e-7 * np.maximum(np.abs(best).max(axis=1, keepdims=True), 1e-30)

    def _scores(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """[queries, rows]: the greater, the nearer."""
        scores: NDArray[np.float64] = self._queries @ x.T
        return 2 * scores - (x * x).sum(axis=1) if self._euclidean else scores

    def recall(self, found: Integers, first: int = 0) -> float:
        """Share of the nearest in `found` [n, k], the answers to queries `first` and on; a negative index is none."""
        hits = 0
        for number, row in enumerate(found, first):
            indices = np.unique(row[(row >= 0) & (row < len(self._rows))])
            x, q = self._rows[indices].astype(np.float64), self._queries[number]
            scores = 2 * (x @ q) - (x * x).sum(axis=1) if self._euclidean else x @ q
            hits += int((scores >= self._kth[number] - self._slack[number]).sum())
        return hits / found.size
