"""What an evaluation is asked for and what it gives: settings, one row per policy, and their table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from octavo.config import KV_DTYPES
from octavo.errors import ConfigError
from octavo.retrofit.agreement import AgreementSettings
from octavo.retrofit.entries import Entry
from octavo.swiftkv import SwiftKVAdapter


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and on how much text. Lengths are in tokens; raises ConfigError for impossible ones.

    `texts`: at most so many pieces of `nll_length` tokens, scored past token `nll_from`. `cases`: needles at each of
    `lengths` (repeats are dropped), cycling through `depths`, the shares of the text before the needle. `batch`:
    sequences at once. `baselines`: measure the training-free policies too.

    `kv_dtype` ("int8" or "fp8"): measure on real caches with quantised pages and, for comparison, on caches with
    pages in the model's dtype. A cache reads `chunk` tokens at a time; a token sees those of its own chunk unquantised,
    so short chunks measure the quantisation best. None: measure without a cache.
    """

    nll_length: int = 8000
    nll_from: int = 1024
    texts: int = 4
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    cases: int = 20
    batch: int = 1
    seed: int = 0
    baselines: bool = True
    answers: AgreementSettings = field(default_factory=AgreementSettings)
    kv_dtype: str | None = None
    chunk: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.nll_from < self.nll_length or min(self.texts, self.cases, self.batch, self.chunk) < 1:
            raise ConfigError("nll_from must lie within nll_length; texts, cases, batch and chunk must be at least 1")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ConfigError("depths must lie in [0, 1]")
        if any(n < 256 for n in self.lengths):
            raise ConfigError("needle lengths must be at least 256 tokens")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ConfigError(f"kv_dtype must be {' or '.join(KV_DTYPES)}, or None, not {self.kv_dtype!r}")
        object.__setattr__(self, "lengths", tuple(dict.fromkeys(self.lengths)))


@dataclass(frozen=True)
class Row:
    """What was measured of one policy.

    `nll`: nats per token. `needle[length]` and `depth[length][i]`: shares of exact answers, over all `cases` and over
    those at `depths[i]`. `kept`: mean slots per KV head after `nll_length` tokens; `nbytes` and `dense_nbytes`: bytes
    that a cache holds then, and what a dense one would hold; None for policies without a cache. `skipped`: share of the
    layers that prompt tokens skip, None without SwiftKV. `same`, `right` and `agreed`: as in `agreement.Answers`, None
    where no questions were asked.
    """

    policy: str
    nll: float
    needle: dict[int, float]
    depth: dict[int, list[float]]
    kept: float
    nbytes: int | None = None
    dense_nbytes: int | None = None
    skipped: float | None = None
    same: float | None = None
    right: float | None = None
    agreed: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All rows, the dense model first, with the settings that made them and the number of questions asked.

    `settings.texts` is the number of texts that there was room for, which may be smaller than what was asked.
    """

    model: str
    settings: EvaluationSettings
    rows: list[Row] = field(default_factory=list)
    questions: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def cells(lengths: Sequence[int], rows: Sequence[Row]) -> list[list[str]]:
    """A table of an evaluation, its header first: needles at `lengths`; columns that no row fills are left out."""
    dense = rows[0]

    def held(row: Row) -> str:
        if row.nbytes is None or row.dense_nbytes is None:
            return ""
        return f"{row.nbytes:,} ({share_text(row.nbytes, row.dense_nbytes)})"

    needles = [{int(n): f"{share:.3f}" for n, share in row.needle.items()} for row in rows]  # JSON's keys are strings
    columns = [
        ["policy", *(row.policy for row in rows)],
        ["layers skipped", *(_percent(row.skipped) for row in rows)],
        ["NLL", *(f"{row.nll:.4f}" for row in rows)],
        ["to dense", *(f"{row.nll - dense.nll:+.4f}" for row in rows)],
        *([f"needle {n:,}", *(found.get(n, "") for found in needles)] for n in lengths),
        ["same answers", *(_percent(row.same) for row in rows)],
        ["right answers", *(_percent(row.right) for row in rows)],
        ["same tokens", *(_percent(row.agreed) for row in rows)],
        ["slots kept", *(f"{row.kept:,.0f}" for row in rows)],
        ["bytes held", *(held(row) for row in rows)],
    ]
    return [list(line) for line in zip(*(c for c in columns if any(c[1:])), strict=True)]


def share_text(nbytes: int, dense_nbytes: int) -> str:
    """Bytes against a dense cache's for people: "1/7.18" where there are fewer, else "1" or "1.03x"."""
    saved = f"{dense_nbytes / nbytes:.2f}"
    if float(saved) > 1:
        return f"1/{saved}"
    more = f"{nbytes / dense_nbytes:.2f}"
    return "1" if float(more) == 1 else f"{more}x"


def skip_points(result: Evaluation, adapters: Sequence[Entry]) -> list[tuple[float, float, str]]:
    """What `plots.skip_curve` draws: (share skipped, NLL to dense, name) of each SwiftKV adapter without gates.

    `adapters`: those that were evaluated, in their order. Of two page dtypes the model's own is drawn.
    """
    dense, *rows = result.rows[:: 1 if result.settings.kv_dtype is None else 2]
    return [
        (row.skipped, row.nll - dense.nll, row.policy)
        for row, entry in zip(rows, adapters, strict=False)
        if isinstance(entry, SwiftKVAdapter) and row.skipped is not None
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
