"""How many layers a model can skip: every share distilled shortly, on the same data, and measured."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from octavo.errors import ConfigError
from octavo.retrofit.checkpoint import CHECKPOINT, read_log, refuse_unfinished
from octavo.retrofit.data import Source
from octavo.retrofit.evaluate import evaluate
from octavo.retrofit.results import EvaluationSettings
from octavo.retrofit.settings import RetrofitSettings, kv_layers_for
from octavo.retrofit.trainer import Retrofit, StepReport
from octavo.swiftkv import SwiftKVAdapter

LAST = 10  # steps that the final loss is the mean of


@dataclass(frozen=True)
class Found:
    """One skipped share: `skip` is what it really is; `to_base` is how much NLL (nats per token) it costs."""

    name: str
    skip: float
    kv_layers: int
    group: int
    loss: float
    nll: float
    to_base: float


@dataclass(frozen=True)
class SearchResult:
    """All shares in ascending order, and the largest whose loss of NLL is under `limit`, if there is one."""

    settings: RetrofitSettings
    evaluation: EvaluationSettings
    limit: float
    base_nll: float
    rows: list[Found]

    @property
    def recommended(self) -> Found | None:
        """The largest skipped share under the limit."""
        return max((row for row in self.rows if row.to_base < self.limit), key=lambda row: row.skip, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {**asdict(self), "recommended": self.recommended.name if self.recommended else None}


def candidates(layers: int, shares: Sequence[float], group: int) -> list[int]:
    """The different K of some shares, most layers kept first. Raises ConfigError."""
    if not shares:
        raise ConfigError("give at least one share of layers to skip")
    return sorted({kv_layers_for(layers, share, group) for share in shares}, reverse=True)


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: list[Source],
    settings: RetrofitSettings,
    kv_layers: Sequence[int],
    folder: Path,
    held_out: npt.NDArray[Any],
    evaluation: EvaluationSettings,
    limit: float,
    resume: bool = False,
    on_step: Callable[[int, StepReport], None] = lambda k, report: None,
) -> tuple[SearchResult, list[SwiftKVAdapter]]:
    """Distil every K in `kv_layers` with the same settings in `folder`/k<K>, and measure all on `held_out`.

    Returns the adapters too, unsaved. Raises what `Retrofit` and `evaluate` raise.
    """
    assert settings.swiftkv is not None
    layers, made, losses = model.config.num_hidden_layers, [], []
    for k in kv_layers if not resume else ():
        refuse_unfinished(folder / f"k{k}")  # all, before the first is trained
    for k in kv_layers:
        each = replace(settings, swiftkv=replace(settings.swiftkv, kv_layers=k))
        run = Retrofit(model, tokenizer, sources, each, folder / f"k{k}")
        if resume and (run.folder / CHECKPOINT).exists():
            run.resume()
        run.run(lambda report, k=k: on_step(k, report))  # type: ignore[misc]
        run.accelerator.wait_for_everyone()  # one process writes the log
        log = read_log(run.folder, settings.steps)
        losses.append(float(np.mean([line["loss"] for line in log[-LAST:]])))
        adapter = run.adapters(f"k{k}")[0]
        assert isinstance(adapter, SwiftKVAdapter)
        made.append(adapter)
    out = evaluate(model, tokenizer, held_out, made, evaluation)
    measured = out.rows
    rows = [
        Found(a.name, 1 - k / layers, k, settings.swiftkv.group, loss, row.nll, row.nll - measured[0].nll)
        for a, k, loss, row in zip(made, kv_layers, losses, measured[1:], strict=True)
    ]
    return SearchResult(settings, out.settings, limit, measured[0].nll, rows), made
