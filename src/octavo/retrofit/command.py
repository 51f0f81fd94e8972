"""`octavo retrofit` and `octavo evaluate`: the parts put together, with progress bars, tables, plots and cards."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from octavo import plots
from octavo.dms import Adapter, save_adapter
from octavo.errors import ConfigError, OutputFileError, TextFileError
from octavo.retrofit.agreement import Question
from octavo.retrofit.card import card_text
from octavo.retrofit.data import Source, encode, load_source, parse_mix, read_text
from octavo.retrofit.entries import Entry
from octavo.retrofit.evaluate import Evaluation, EvaluationSettings, cells, evaluate
from octavo.retrofit.search import SearchResult, candidates, search
from octavo.retrofit.settings import RetrofitSettings
from octavo.retrofit.start import Init
from octavo.retrofit.trainer import LOG, Retrofit, StepReport
from octavo.swiftkv import SwiftKVAdapter, load_swiftkv_adapter, save_swiftkv_adapter

Trained = Sequence[SwiftKVAdapter | Adapter]


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    data: list[str],
    settings: RetrofitSettings,
    folder: Path,
    name: str,
    init: Init,
    resume: bool,
    held_out: Path | None,
    console: Console,
    gates_name: str | None = None,
) -> Trained:
    """Train, draw the run, save the adapters into `folder`, and measure them on `held_out` where it is given.

    Gates trained together with SwiftKV lie in `folder`/`gates_name`.
    """
    _check_text(held_out)  # before hours of training, not after
    run = Retrofit(model, tokenizer, _sources(data, tokenizer, settings, console), settings, folder, init)
    if resume:
        run.resume()
    with _progress(console) as bar:
        task = bar.add_task("", total=settings.steps, completed=run.step)
        run.run(lambda r: bar.update(task, completed=r.step, description=progress_text(r)))
    adapters: Trained = run.adapters(name, gates_name)
    if run.accelerator.is_main_process:
        log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        plots.training(log, folder / "training.png")
        adapters = save(adapters, folder)
        if held_out is not None:
            measured = evaluate_for_card(model, tokenizer, held_out, adapters, settings, console)
            for adapter in adapters:
                adapter.card["evaluation"] = measured.to_json()
            adapters = save(adapters, folder)
        console.print(f"{' and '.join(adapter.name for adapter in adapters)} in {folder}")
    return adapters


def save(adapters: Trained, folder: Path) -> Trained:
    """Write what one run trained, with cards; returns it as the files hold it. Raises OutputFileError."""
    saved: list[SwiftKVAdapter | Adapter] = []
    for adapter in adapters:
        place = folder
        if isinstance(adapter, SwiftKVAdapter):
            save_swiftkv_adapter(adapter, folder)
            saved.append(load_swiftkv_adapter(folder))
        else:
            if saved and isinstance(saved[0], SwiftKVAdapter):
                adapter = replace(adapter, swiftkv=saved[0].swiftkv.fingerprint())
                place = folder / adapter.name
            save_adapter(adapter, place)
            saved.append(adapter)
        (place / "README.md").write_text(card_text(adapter))
    return saved


def find_skip(
    model: PreTrainedModel,
    tokenizer: Any,
    data: list[str],
    settings: RetrofitSettings,
    shares: Sequence[float],
    folder: Path,
    resume: bool,
    held_out: Path | None,
    limit: float,
    console: Console,
) -> SearchResult:
    """Distil and measure every share of skipped layers; a table, search.json and search.png, adapters in k<K>/."""
    if held_out is None:
        raise ConfigError("a search measures on text that was not trained on; give --held-out")
    assert settings.swiftkv is not None
    kv_layers = candidates(model.config.num_hidden_layers, shares, settings.swiftkv.group)
    _check_text(held_out)
    tokens = np.array(encode(tokenizer, read_text(held_out)))
    n = settings.length
    if len(tokens) < n:
        raise TextFileError(f"{held_out} has {len(tokens):,} tokens; {n:,} are needed")
    measure = EvaluationSettings(
        nll_length=n,
        nll_from=max(1, min(1024, n // 2)),
        texts=16,
        lengths=(),
        batch=settings.micro_batch,
        baselines=False,
    )
    sources = _sources(data, tokenizer, settings, console)
    with _progress(console) as bar:
        tasks = {k: bar.add_task(f"K={k}", total=settings.steps) for k in kv_layers}
        result, adapters = search(
            model, tokenizer, sources, settings, kv_layers, folder, tokens, measure, limit, resume,
            lambda k, r: bar.update(tasks[k], completed=r.step, description=f"K={k}  {progress_text(r)}"),
        )  # fmt: skip
    if not PartialState().is_main_process:
        return result
    found = result.to_json()
    for adapter in adapters:
        adapter.card["search"] = {key: found[key] for key in ("settings", "limit", "base_nll", "evaluation", "rows")}
        save([adapter], folder / adapter.name)
    try:
        (folder / "search.json").write_text(json.dumps(found, indent=2) + "\n")
    except OSError as e:
        raise OutputFileError(f"cannot write {folder / 'search.json'}: {e.strerror}") from e
    plots.skip_curve([(row.skip, row.to_base, row.name) for row in result.rows], folder / "search.png", limit)
    console.print(search_table(result))
    best = result.recommended
    console.print(
        f"{folder / best.name} skips {best.skip:.0%} of the layers at {best.to_base:+.4f}, the most under {limit:+.3f}"
        if best
        else f"no share stays under {limit:+.3f}; train longer or skip less"
    )
    return result


def progress_text(r: StepReport) -> str:
    """What a progress bar says of a step."""
    parts = [f"loss {r.loss:.4f}", f"KL {r.kl:.4f}"]
    if r.mse is not None:
        parts.append(f"MSE {r.mse:.4f}")
    if r.ratio is not None:
        parts.append(f"ratio {r.ratio:.2f} of {r.target:.2f}")
    return "  ".join(parts)


def evaluate_for_card(
    model: PreTrainedModel, tokenizer: Any, text: Path, adapters: Trained, trained: RetrofitSettings, console: Console
) -> Evaluation:
    """An evaluation at the length that was trained for: the first adapter, and all together."""
    n = trained.length
    settings = EvaluationSettings(
        nll_length=n,
        nll_from=max(1, min(1024, n // 2)),
        texts=4,
        lengths=tuple(x for x in (n // 4, n // 2, n) if x >= 256),
        cases=20,
        batch=trained.micro_batch,
    )
    entries: list[Entry] = [adapters[0]]
    if len(adapters) > 1:
        entries.append((adapters[0], adapters[1]))  # type: ignore[arg-type]
    return run_evaluation(model, tokenizer, text, entries, settings, console)


def run_evaluation(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Path,
    adapters: Sequence[Entry],
    settings: EvaluationSettings,
    console: Console,
    questions: Sequence[Question] = (),
) -> Evaluation:
    """Evaluate on a text file, with a status line meanwhile and a table at the end."""
    tokens = np.array(encode(tokenizer, read_text(text)))
    with console.status("measuring") as status:
        result = evaluate(
            model, tokenizer, tokens, adapters, settings, lambda row: status.update(f"measured {row.policy}"), questions
        )
    console.print(evaluation_table(result))
    return result


def evaluation_table(result: Evaluation) -> Table:
    """One column per policy, so that a few of them fit into 80 characters."""
    s = result.settings
    asked = f", {result.questions} questions" if result.questions else ""
    title = f"{result.model}: NLL past token {s.nll_from} of {s.nll_length}, {s.cases} needles per length{asked}"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    heads, *rows = zip(*cells(s.lengths, result.rows), strict=True)
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:]:
        table.add_column(head, justify="right", overflow="fold")  # figures break, none is cut off
    for row in rows:
        table.add_row(*row)
    return table


def search_table(result: SearchResult) -> Table:
    """One line per share of skipped layers, the recommended one marked."""
    table = Table(title=f"skipped layers against NLL, base {result.base_nll:.4f}, limit {result.limit:+.3f}")
    for head in ("layers skipped", "K", "group", "final loss", "NLL", "to base", ""):
        table.add_column(head, justify="right")
    for row in result.rows:
        mark = "recommended" if row == result.recommended else ""
        measured = (f"{row.loss:.4f}", f"{row.nll:.4f}", f"{row.to_base:+.4f}")
        table.add_row(f"{row.skip:.1%}", str(row.kv_layers), str(row.group), *measured, mark)
    return table


def _sources(data: list[str], tokenizer: Any, settings: RetrofitSettings, console: Console) -> list[Source]:
    with console.status("reading the data"):
        return [load_source(path, tokenizer, settings.length, share) for path, share in parse_mix(data)]


def _check_text(path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise TextFileError(f"cannot read {path}: no such file")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
