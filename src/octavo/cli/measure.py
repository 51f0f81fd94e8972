"""`octavo evaluate` and `octavo export`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.terminal import Device, Dtype, Model, check_writable, console, dtype_of, load_plain, numbers
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.retrofit.entries import Entry
    from octavo.retrofit.results import Evaluation, EvaluationSettings

app = typer.Typer()

SUITE = "long"
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="Adapter to measure, or two joined by '+'; may be repeated, LABEL=ADAPTER names it in tables. 'none', or "
        "'auto', the default."
    ),
]
Suite = Annotated[
    str | None, typer.Option(help=f"'{SUITE}': also code, chats, copying, look-ups; 24 texts and 200 cases a row.")
]
Lengths = Annotated[
    str | None, typer.Option(help="Prompt lengths in tokens; 2048,4096, with --suite also 8192; there 1800 at least.")
]
Cases = Annotated[int | None, typer.Option(help="Needles, or answers, at each length; 10, with --suite 200.")]
Texts = Annotated[int | None, typer.Option(help="Pieces of text for the NLL; 1, with --suite 24.")]
NllLength = Annotated[int | None, typer.Option(help="Tokens of each; 4096, with --suite 8192.")]
Code = Annotated[Path | None, typer.Option(help="Source code kept apart from training, for --suite.")]
Named = Annotated[
    list[str] | None, typer.Option("--text", help="NAME=FILE, one more text for --suite; may be repeated.")
]
Chats = Annotated[
    Path | None, typer.Option(help="Chats of 'octavo retrofit chats' for --suite; sampled by it if left out.")
]
Sample = Annotated[bool, typer.Option(help="Whether --suite samples chats where none are given.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens in one forward of --suite; 32768 if left out.")]
EveryBudget = Annotated[
    bool, typer.Option("--every-budget", help="With --suite, rivals at the bytes of all gates, not of the first alone.")
]
HeldPages = Annotated[
    str | None, typer.Option(help="Measure on real caches with int8 or fp8 pages, and with pages in the model's dtype.")
]
Questions = Annotated[
    Path | None, typer.Option(help="JSONL of 'question' and 'answer': how far answers agree with the base model's.")
]
Record = Annotated[
    Path | None,
    typer.Option(help="JSON file, with --suite written after every policy; the plot goes beside it, with .png."),
]


@app.command()
def evaluate(
    text: Annotated[Path, typer.Argument(help="Running text that the adapters were not trained on.")],
    model: Model = None,
    adapter: Adapters = None,
    suite: Suite = None,
    lengths: Lengths = None,
    cases: Cases = None,
    texts: Texts = None,
    nll_length: NllLength = None,
    nll_from: int = 1024,
    batch: int = 1,
    baselines: Annotated[bool, typer.Option(help="Measure the training-free policies too.")] = True,
    kv_dtype: HeldPages = None,
    chunk: Annotated[int, typer.Option(help="Tokens that these caches read at a time.")] = 256,
    code: Code = None,
    text_named: Named = None,
    chats: Chats = None,
    sample: Sample = True,
    batch_tokens: BatchTokens = None,
    every_budget: EveryBudget = False,
    questions: Questions = None,
    question_cases: Annotated[int, typer.Option(help="Questions to ask, from the file's first on.")] = 200,
    out: Record = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what adapters cost: NLL, needles found, bytes held; dense, adapters and training-free policies."""
    from octavo.cli import long_suite
    from octavo.cli.training import run_evaluation
    from octavo.retrofit.agreement import read_questions

    sizes = None if lengths is None else numbers("--lengths", lengths, int)
    amounts = {"lengths": sizes, "cases": cases, "texts": texts, "nll_length": nll_length, "nll_from": nll_from}
    given = {name: value for name, value in amounts.items() if value is not None} | {"baselines": baselines}
    data = (code, text_named or [], chats)
    settings = _plain_settings(
        suite, given, batch, question_cases, kv_dtype, chunk, [*data, batch_tokens, every_budget]
    )
    long_settings = _long_settings(given, batch_tokens, every_budget) if suite else None
    _check_out(out)
    asked = read_questions(questions, question_cases) if questions else []
    entries = _entries(adapter or ["auto"], model)
    loaded, tokenizer = load_plain(model, dtype, device)
    if long_settings is not None:
        words = [each.question for each in asked]
        long_suite.run(loaded, tokenizer, text, *data, words, entries, long_settings, sample, out, console)
        return
    adapters = list(entries.values())
    result = run_evaluation(loaded, tokenizer, text, adapters, settings, console, asked)
    if out is not None:
        _write(result, adapters, out)


def _plain_settings(
    suite: str | None, given: dict[str, Any], batch: int, questions: int, kv_dtype: str | None, chunk: int,
    for_suite: Sequence[object],
) -> "EvaluationSettings":  # fmt: skip
    """The settings of an evaluation without a suite; raises ConfigError for options that do not go together."""
    from octavo.retrofit.agreement import AgreementSettings
    from octavo.retrofit.results import EvaluationSettings

    if suite not in (None, SUITE):
        raise ConfigError(f"the suite is '{SUITE}', not {suite!r}")
    if suite is not None and kv_dtype is not None:
        raise ConfigError("the suite is read without a cache; leave --kv-dtype out")
    if suite is None and any(for_suite):
        raise ConfigError(
            f"--code, --text, --chats, --batch-tokens and --every-budget are for --suite {SUITE}; give it too"
        )
    defaults: dict[str, Any] = {"nll_length": 4096, "texts": 1, "lengths": (2048, 4096), "cases": 10}
    return EvaluationSettings(
        **(defaults if suite else defaults | given), batch=batch, answers=AgreementSettings(questions),
        kv_dtype=kv_dtype, chunk=chunk,
    )  # fmt: skip


def _long_settings(given: dict[str, Any], batch_tokens: int | None, every_budget: bool) -> Any:
    from octavo.retrofit.suite import LongSettings

    settings = LongSettings(**given, every_budget=every_budget)
    settings = settings if batch_tokens is None else replace(settings, batch_tokens=batch_tokens)
    longest = max(settings.nll_length, *settings.lengths, 0)
    return replace(settings, held_at=min(settings.held_at, longest))


def _check_out(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix.lower() in (".png", ".md"):
        raise ConfigError(
            f"--out names the JSON file, with plots and tables beside it; give another ending than {out}'s"
        )
    check_writable(out)


def _entries(names: Sequence[str], model: str | None) -> "dict[str, Entry]":
    """What to measure, by the names that tables give it."""
    from octavo.models import find_adapters
    from octavo.retrofit.entries import named, together

    found = []
    for name in names:
        label, equals, adapter = name.rpartition("=")
        if Path(name).exists():
            label, equals, adapter = "", "", name
        if equals and not label.strip():
            raise ConfigError(f"{name!r} has no label before '='")
        resolved = find_adapters(None if adapter == "none" else adapter, model)
        if resolved:
            found.append((label.strip() or None, together(resolved)))
    return named(found)


def _write(result: "Evaluation", adapters: "Sequence[Entry]", out: Path) -> None:
    """The JSON file, the plot beside it and, for several SwiftKV adapters, what skipping costs."""
    from octavo.cli import plots
    from octavo.cli.training import write_text
    from octavo.retrofit.results import skip_points

    write_text(out, json.dumps(result.to_json(), indent=2) + "\n")
    made = [out, out.with_suffix(".png")]
    plots.evaluation(result, made[-1])
    points = skip_points(result, adapters)
    if len(points) > 1:
        made.append(out.with_name(f"{out.stem}-skip.png"))
        plots.skip_curve(points, made[-1])
    console.print(f"wrote {', '.join(map(str, made))}")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Folder to write; empty or not there.")],
    adapter: Annotated[str, typer.Option(help="SwiftKV adapter or gates: folder, shipped name or hub id.")] = "swiftkv",
    model: Model = None,
    layout: Annotated[
        str | None, typer.Option(help="'arctic' for SwiftKV, 'nvidia' for gates; what the adapter is if left out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, as published checkpoints are, or bf16 or fp16.")] = "fp32",
) -> None:
    """Write a model and its SwiftKV adapter or its gates as one published checkpoint, for other engines."""
    import octavo

    found = octavo.load_adapter(adapter)
    fits = "arctic" if isinstance(found, octavo.SwiftKVAdapter) else "nvidia"
    if layout not in (None, fits):
        raise ConfigError(
            f"{adapter} is written in the layout '{fits}', not in {layout!r}: 'nvidia' is for gates alone"
        )
    loaded, tokenizer = load_plain(model, dtype, "cpu")
    octavo.save_published(loaded, found, out, tokenizer, dtype=dtype_of(dtype))
    console.print(f"wrote {out}")
