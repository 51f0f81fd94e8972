"""`octavo retrofit dms` and `octavo evaluate`: the parts put together, with progress bars, tables and plots."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from octavo import plots
from octavo.dms import Adapter, load_adapter, save_adapter
from octavo.errors import TextFileError
from octavo.retrofit.data import encode, load_source, parse_mix, read_text
from octavo.retrofit.evaluate import Evaluation, EvaluationSettings, Row, evaluate
from octavo.retrofit.trainer import LOG, Retrofit, RetrofitSettings, StepReport


def retrofit_dms(
    model: PreTrainedModel,
    tokenizer: Any,
    data: list[str],
    settings: RetrofitSettings,
    folder: Path,
    name: str,
    init: str | None,
    resume: bool,
    held_out: Path | None,
    console: Console,
) -> Adapter:
    """Train, draw the run, evaluate on `held_out` where it is given, and save the adapter into `folder`."""
    if held_out is not None and not held_out.is_file():
        raise TextFileError(f"cannot read {held_out}: no such file")  # before hours of training, not after
    with console.status("reading the data"):
        sources = [load_source(path, tokenizer, settings.length, share) for path, share in parse_mix(data)]
    run = Retrofit(model, tokenizer, sources, settings, folder, load_adapter(init) if init else None)
    if resume:
        run.resume()
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=settings.steps, completed=run.step)

        def show(r: StepReport) -> None:
            loss = r.kl + settings.eviction_weight * r.missing
            text = f"loss {loss:.4f}  KL {r.kl:.4f}  ratio {r.ratio:.2f} of {r.target:.2f}"
            bar.update(task, completed=r.step, description=text)

        run.run(show)
    adapter = run.adapter(name)
    if run.accelerator.is_main_process:
        log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        plots.training(log, folder / "training.png")
        if held_out is not None:
            measured = evaluate_for_card(model, tokenizer, held_out, adapter, settings, console)
            adapter = replace(adapter, card={**adapter.card, "evaluation": measured.to_json()})
        save_adapter(adapter, folder)
        (folder / "README.md").write_text(card_text(adapter))
        console.print(f"adapter {name} is in {folder}")
    return adapter


def evaluate_for_card(
    model: PreTrainedModel, tokenizer: Any, text: Path, adapter: Adapter, trained: RetrofitSettings, console: Console
) -> Evaluation:
    """An evaluation at the length that was trained for."""
    n = trained.length
    settings = EvaluationSettings(
        nll_length=n,
        nll_from=max(1, min(1024, n // 2)),
        texts=4,
        lengths=tuple(x for x in (n // 4, n // 2, n) if x >= 256),
        cases=20,
        batch=trained.micro_batch,
    )
    return run_evaluation(model, tokenizer, text, [adapter], settings, console)


def run_evaluation(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Path,
    adapters: list[Adapter],
    settings: EvaluationSettings,
    console: Console,
) -> Evaluation:
    """Evaluate on a text file, with a status line meanwhile and a table at the end."""
    tokens = np.array(encode(tokenizer, read_text(text)))
    with console.status("measuring") as status:
        result = evaluate(
            model, tokenizer, tokens, adapters, settings, lambda row: status.update(f"measured {row.policy}")
        )
    console.print(evaluation_table(result))
    return result


def evaluation_table(result: Evaluation) -> Table:
    """One line per policy."""
    s = result.settings
    table = Table(title=f"{result.model}: NLL past token {s.nll_from} of {s.nll_length}, {s.cases} needles per length")
    table.add_column("policy")
    for head in ("NLL", "to dense", *(f"needle {n:,}" for n in s.lengths), "slots kept", "bytes held"):
        table.add_column(head, justify="right")
    for row in result.rows:
        table.add_row(*_cells(row, result.rows[0]))
    return table


def card_text(adapter: Adapter) -> str:
    """The adapter's card in Markdown: settings, data and measured results."""
    card, spec = adapter.card, adapter.gates.spec
    lines = [
        f"# {adapter.name}",
        "",
        f"DMS gates for a {adapter.fingerprint['model_type']} model with {spec.layers} layers; window "
        f"{spec.eviction.window}, shift {spec.eviction.shift}, one decision per {spec.granularity}, "
        f"trained for {adapter.target:g} tokens per kept token.",
        "",
        f"Started from {card.get('init') or 'gates that keep everything'}.",
        "Training: " + ", ".join(f"{k} {v}" for k, v in card.get("settings", {}).items()) + ".",
        "Data: " + ", ".join(f"{k} (share {v:g})" for k, v in card.get("data", {}).items()) + ".",
    ]
    measured = card.get("evaluation")
    if measured:
        s = measured["settings"]
        heads = ["policy", "NLL", "to dense", *(f"needle {n:,}" for n in s["lengths"]), "slots kept", "bytes held"]
        lines += [
            "",
            f"Measured on held-out text: NLL past token {s['nll_from']} of {s['nll_length']} ({s['texts']} texts), "
            f"{s['cases']} needles per length, bytes after the first text.",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + " --- |" * len(heads),
        ]
        rows = [Row(**row) for row in measured["rows"]]
        lines += ["| " + " | ".join(_cells(row, rows[0])) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row, dense: Row) -> list[str]:
    held = (
        ""
        if row.nbytes is None or row.dense_nbytes is None
        else f"{row.nbytes:,} (1/{row.dense_nbytes / row.nbytes:.2f})"
    )
    found = [f"{share:.3f}" for share in row.needle.values()]
    return [row.policy, f"{row.nll:.4f}", f"{row.nll - dense.nll:+.4f}", *found, f"{row.kept:,.0f}", held]
