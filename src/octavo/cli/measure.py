"""`octavo evaluate` and `octavo export`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.terminal import Device, Dtype, Model, check_writable, console, dtype_of, load_plain, numbers
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.retrofit.entries import Entry
    from octavo.retrofit.results import Evaluation

app = typer.Typer()


@app.command()
def evaluate(
    text: Annotated[Path, typer.Argument(help="Running text that the adapters were not trained on.")],
    model: Model = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter to measure, or two joined by '+'; may be repeated. 'none', or 'auto', the default."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Needle prompt lengths in tokens.")] = "2048,4096",
    cases: Annotated[int, typer.Option(help="Needles at each length.")] = 10,
    texts: Annotated[int, typer.Option(help="Pieces of text for the NLL.")] = 1,
    nll_length: int = 4096,
    nll_from: int = 1024,
    batch: int = 1,
    baselines: Annotated[bool, typer.Option(help="Measure the training-free policies too.")] = True,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="Measure on real caches with int8 or fp8 pages, and with pages in the model's dtype."),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens that these caches read at a time.")] = 256,
    questions: Annotated[
        Path | None, typer.Option(help="JSONL of 'question' and 'answer': how far answers agree with the base model's.")
    ] = None,
    question_cases: Annotated[int, typer.Option(help="Questions to ask, from the file's first on.")] = 200,
    out: Annotated[Path | None, typer.Option(help="JSON file; the plot goes beside it, with .png.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what adapters cost: NLL, needles found, bytes held; dense, adapters and training-free policies."""
    from octavo.cli.training import run_evaluation
    from octavo.models import find_adapters
    from octavo.retrofit.agreement import AgreementSettings, read_questions
    from octavo.retrofit.entries import together
    from octavo.retrofit.results import EvaluationSettings

    sizes = numbers("--lengths", lengths, int)
    settings = EvaluationSettings(
        nll_length=nll_length, nll_from=nll_from, texts=texts, lengths=sizes, cases=cases, batch=batch,
        baselines=baselines, answers=AgreementSettings(question_cases), kv_dtype=kv_dtype, chunk=chunk,
    )  # fmt: skip
    if out is not None:
        if out.suffix.lower() == ".png":
            raise ConfigError(
                f"--out names the JSON file and the plot goes beside it; give another ending than {out}'s"
            )
        check_writable(out)
    asked = read_questions(questions, question_cases) if questions else []
    found = [find_adapters(None if name == "none" else name, model) for name in adapter or ["auto"]]
    adapters = [together(each) for each in found if each]
    loaded, tokenizer = load_plain(model, dtype, device)
    result = run_evaluation(loaded, tokenizer, text, adapters, settings, console, asked)
    if out is not None:
        _write(result, adapters, out)


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
    adapter: Annotated[str, typer.Option(help="SwiftKV adapter: folder, shipped name or hub id.")] = "swiftkv",
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="fp32, as published checkpoints are, or bf16 or fp16.")] = "fp32",
) -> None:
    """Write a Llama or Qwen2 model and its SwiftKV adapter as one published checkpoint, for other engines."""
    from octavo.attachment.adapters import load_adapter
    from octavo.models import save_published
    from octavo.swiftkv import SwiftKVAdapter

    found = load_adapter(adapter)
    if not isinstance(found, SwiftKVAdapter):
        raise ConfigError(f"{adapter} is a set of DMS gates; give a SwiftKV adapter")
    loaded, tokenizer = load_plain(model, dtype, "cpu")
    save_published(loaded, found, out, tokenizer, dtype=dtype_of(dtype))
    console.print(f"wrote {out}")
