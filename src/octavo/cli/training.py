"""`octavo retrofit` and `octavo evaluate`: the parts put together, with progress bars, tables, plots and cards."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

import octavo
from octavo.cli import plots
from octavo.cli.training_text import TrainingText, gather
from octavo.errors import AdapterFileError, ConfigError, OutputFileError, TextFileError
from octavo.retrofit.agreement import Question
from octavo.retrofit.card import card_text, needles_phrase
from octavo.retrofit.checkpoint import FILES, read_log, refuse_others, refuse_unfinished
from octavo.retrofit.data import encode, read_text
from octavo.retrofit.entries import Entry
from octavo.retrofit.evaluate import evaluate
from octavo.retrofit.results import Evaluation, EvaluationSettings, Row, cells
from octavo.retrofit.sampling import RECORD, TEXT
from octavo.retrofit.search import SearchResult, candidates, search
from octavo.retrofit.settings import RetrofitSettings
from octavo.retrofit.start import Init, chosen
from octavo.retrofit.trainer import Retrofit, StepReport

Either = octavo.SwiftKVAdapter | octavo.Adapter
Trained = Sequence[Either]
CARD, PLOT = "README.md", "training.png"


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TrainingText,
    settings: RetrofitSettings,
    folder: Path,
    name: str | None,
    init: Init,
    resume: bool,
    held_out: Path | None,
    console: Console,
    gates_name: str | None = None,
) -> Trained:
    """Train, draw the run, save the adapters into `folder`, and measure them on `held_out` where it is given.

    The adapter is named as the folder where `name` is None; gates trained together with SwiftKV lie in
    `folder`/`gates_name`. Everything that can be checked is checked before hours of training, not after. Where a
    resumed run was finished already, cards keep their evaluation.
    """
    if settings.gates is not None and settings.swiftkv is not None:
        gates_name = gates_name or settings.gates.name
        _check_gates_name(gates_name, folder)
    tokens = None if held_out is None else _held_out(held_out, tokenizer, settings.length)
    measure = None if tokens is None else card_settings(settings)
    chosen(model, settings, init)
    if not resume:
        refuse_unfinished(folder)
        refuse_others(folder, settings.swiftkv is not None, gates_name)
    sources, said = gather(data, model, tokenizer, settings, folder, resume, console)
    run = Retrofit(model, tokenizer, sources, settings, folder, init)
    if resume:
        run.resume()
    finished = run.step == settings.steps
    with _progress(console) as bar:
        task = bar.add_task("", total=settings.steps, completed=run.step)
        run.run(lambda r: bar.update(task, completed=r.step, description=progress_text(r)))
    adapters: Trained = run.adapters(name or folder.resolve().name, gates_name)
    for adapter in adapters:
        adapter.card.update(said)
    if run.accelerator.is_main_process:
        plots.training(read_log(folder, settings.steps), folder / PLOT)
        if finished:
            _keep_evaluation(adapters, folder)
        adapters = save(adapters, folder)
        if tokens is not None and measure is not None:
            measured = evaluate_for_card(model, tokenizer, tokens, adapters, measure, console)
            for adapter in adapters:
                adapter.card["evaluation"] = measured.to_json()
            adapters = save(adapters, folder)
        console.print(escape(f"{' and '.join(adapter.name for adapter in adapters)} in {folder}"))
    return adapters


def _check_gates_name(name: str, folder: Path) -> None:
    plain = name not in ("", "..") and name == Path(name).name and not set(name) & set("+/\\\0")
    if not plain:
        raise ConfigError(f"--gates-name must be the name of a folder inside {folder}, without '+', not {name!r}")
    taken = name.removesuffix(".new") in (*FILES, TEXT, RECORD, CARD, PLOT)
    if taken or ((folder / name).exists() and not (folder / name).is_dir()):
        raise ConfigError(f"--gates-name {name} is the name of a file in {folder}; give another")


def _keep_evaluation(adapters: Trained, folder: Path) -> None:
    """Put on the cards what is on those in `folder`, where nothing was trained since."""
    for adapter in adapters:
        try:
            card = octavo.load_adapter(_place(adapter, folder)).card
        except AdapterFileError:
            continue  # none was saved yet
        if "evaluation" in card:
            adapter.card["evaluation"] = card["evaluation"]


def _place(adapter: Either, folder: Path) -> Path:
    """Gates made on a transform lie in a folder inside the transform's."""
    return folder if isinstance(adapter, octavo.SwiftKVAdapter) or adapter.made_on is None else folder / adapter.name


def save(adapters: Trained, folder: Path) -> Trained:
    """Write what one run trained, with cards; returns it as the files hold it. Raises OutputFileError."""
    saved: list[Either] = []
    for adapter in adapters:
        place = _place(adapter, folder)
        if isinstance(adapter, octavo.SwiftKVAdapter):
            octavo.save_swiftkv_adapter(adapter, folder)
            saved.append(octavo.load_adapter(folder))
        else:
            if saved and isinstance(saved[0], octavo.SwiftKVAdapter):
                adapter = replace(adapter, made_on=saved[0].transform.fingerprint())
            octavo.save_adapter(adapter, place)
            saved.append(adapter)
        write_text(place / CARD, card_text(adapter))
    return saved


def find_skip(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TrainingText,
    settings: RetrofitSettings,
    shares: Sequence[float],
    folder: Path,
    resume: bool,
    held_out: Path | None,
    limit: float,
    console: Console,
) -> SearchResult:
    """Distil and measure every share of skipped layers; a table, search.json and search.png, adapters in k<K>/.

    `limit`: the loss of NLL, in nats per token, that is allowed. Raises ConfigError and what `search` raises.
    """
    if held_out is None:
        raise ConfigError("a search measures on text that was not trained on; give --held-out")
    if not math.isfinite(limit):
        raise ConfigError(f"limit must be a finite number, not {limit}")
    assert settings.swiftkv is not None
    kv_layers = candidates(model.config.num_hidden_layers, shares, settings.swiftkv.group)
    for k in kv_layers:
        chosen(model, replace(settings, swiftkv=replace(settings.swiftkv, kv_layers=k)), ())
    tokens = _held_out(held_out, tokenizer, settings.length)
    measure = replace(card_settings(settings, 16), lengths=(), baselines=False)
    for k in kv_layers if not resume else ():
        refuse_unfinished(folder / f"k{k}")
    sources, said = gather(data, model, tokenizer, settings, folder, resume, console)
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
        adapter.card.update(said)
        save([adapter], folder / adapter.name)
    write_text(folder / "search.json", json.dumps(found, indent=2) + "\n")
    plots.skip_curve([(row.skip, row.to_base, row.name) for row in result.rows], folder / "search.png", limit)
    console.print(search_table(result))
    best = result.recommended
    console.print(
        f"{escape(str(folder / best.name))} skips {best.skip:.0%} of the layers at {best.to_base:+.4f}, "
        f"the most under {limit:+.3f}"
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


def card_settings(trained: RetrofitSettings, texts: int = 4) -> EvaluationSettings:
    """How a run is measured at the length that it trained for. Raises ConfigError."""
    n = trained.length
    return EvaluationSettings(
        nll_length=n,
        nll_from=max(1, min(1024, n // 2)),
        texts=texts,
        lengths=tuple(x for x in (n // 4, n // 2, n) if x >= 256),
        cases=20,
        batch=trained.micro_batch,
    )


def evaluate_for_card(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: npt.NDArray[Any],
    adapters: Trained,
    settings: EvaluationSettings,
    console: Console,
) -> Evaluation:
    """An evaluation of the first adapter, and of all together. Raises as `evaluate` does."""
    entries: list[Entry] = [adapters[0]]
    if len(adapters) > 1:
        entries.append((adapters[0], adapters[1]))  # type: ignore[arg-type]
    return _measured(model, tokenizer, tokens, entries, settings, console)


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
    return _measured(model, tokenizer, tokens, adapters, settings, console, questions)


def _measured(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: npt.NDArray[Any],
    adapters: Sequence[Entry],
    settings: EvaluationSettings,
    console: Console,
    questions: Sequence[Question] = (),
) -> Evaluation:
    with console.status("measuring") as status:

        def show(row: Row) -> None:
            status.update(f"measured {escape(row.policy)}")

        result = evaluate(model, tokenizer, tokens, adapters, settings, show, questions)
    console.print(evaluation_table(result))
    return result


def evaluation_table(result: Evaluation) -> Table:
    """One column per policy, so that a few of them fit into 80 characters."""
    s = result.settings
    asked = f", {result.questions} questions" if result.questions else ""
    cached = "" if s.kv_dtype is None else f", caches read in chunks of {s.chunk}"
    needles = needles_phrase(s.lengths, s.cases)
    title = f"{result.model}: NLL past token {s.nll_from} of {s.nll_length}{needles}{asked}{cached}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    heads, *rows = zip(*([escape(cell) for cell in line] for line in cells(s.lengths, result.rows)), strict=True)
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


def _held_out(path: Path, tokenizer: Any, length: int) -> npt.NDArray[Any]:
    """The tokens of a text, enough for a sequence of `length`. Raises TextFileError."""
    tokens = np.array(encode(tokenizer, read_text(path)))
    if len(tokens) < length:
        raise TextFileError(f"{path} has {len(tokens):,} tokens; {length:,} are needed")
    return tokens


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises OutputFileError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
