"""The command line. A user's mistake is one line on standard error and exit code 2."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli_retrofit import app as retrofit
from octavo.errors import CacheBudgetError, ConfigError, OctavoError, PromptError
from octavo.terminal import (
    AdapterName,
    Budget,
    Device,
    Dtype,
    Model,
    check_writable,
    console,
    dtype_of,
    load,
    load_plain,
    numbers,
    reading_input,
)

app = typer.Typer(
    help="Cheap LLM inference for Hugging Face models.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(retrofit, name="retrofit")
with contextlib.suppress(ImportError):  # octavo.vdb is its C extension, which needs a compiler at installation
    from octavo.vdb.bench.command import app as bench
    from octavo.vdb.command import app as vdb

    app.add_typer(vdb, name="vdb")
    app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `octavo` command."""
    try:
        app()
    except OctavoError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo(
    model: Model = None,
    adapter: AdapterName = "auto",
    swiftkv: Annotated[bool, typer.Option("--swiftkv", help="Skip layers too: --adapter swiftkv+dms-8x.")] = False,
    file: Annotated[Path | None, typer.Option(help="Text to read instead of the one that ships.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question about the text; may be repeated.")] = None,
    png: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path("octavo-demo.png"),
    budget: Budget = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer questions about a long text, with Octavo and without, and show what each costs."""
    from octavo import demo as demonstration
    from octavo.retrofit.data import read_text

    check_writable(png)
    if swiftkv and adapter != "auto":
        raise ConfigError("--swiftkv names the shipped adapters; leave it out and give --adapter both, joined by '+'")
    text = read_text(file or demonstration.TEXT)
    if file is not None and not question:
        raise ConfigError("give at least one --question about your --file")
    loaded, tokenizer = load(model, "swiftkv+dms-8x" if swiftkv else adapter, dtype, device, budget)
    demonstration.run(loaded, tokenizer, text, question or demonstration.QUESTIONS, console, png)


@app.command()
def chat(
    model: Model = None,
    adapter: AdapterName = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    budget: Budget = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk to a model; the cache lives on between turns. An empty line or Ctrl-D ends the chat.

    A turn that is too long is refused, and the chat goes on.
    """
    from octavo.chat import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = load(model, adapter, dtype, device, budget)
    conversation = Conversation(loaded, tokenizer, sampling)
    while True:
        try:
            with reading_input():
                text = console.input("[bold cyan]you> [/bold cyan]")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            break
        try:
            for piece in conversation.ask(text):
                console.print(piece, end="", markup=False, highlight=False)
        except KeyboardInterrupt:
            console.print(" [interrupted]", markup=False)
        except (PromptError, CacheBudgetError) as e:
            console.print(f"error: {e}", markup=False, highlight=False)
        cache = conversation.cache
        console.print(f"\n[dim]{cache.seen:,} tokens, {cache.nbytes:,} B held, dense {cache.dense_nbytes:,} B[/dim]")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; standard input if left out.")] = None,
    file: Annotated[Path | None, typer.Option(help="Text put before the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without a chat template.")] = False,
    model: Model = None,
    adapter: AdapterName = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    budget: Budget = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer one prompt, streaming."""
    from octavo.chat import Conversation, Sampling
    from octavo.retrofit.data import read_text

    with reading_input():
        text = prompt if prompt is not None else sys.stdin.read()
    if file is not None:
        text = f"{read_text(file)}\n\n{text}"
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = load(model, adapter, dtype, device, budget)
    conversation = Conversation(loaded, tokenizer, sampling)
    for piece in conversation.complete(text) if raw else conversation.ask(text):
        print(piece, end="", flush=True)
    print()


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
    questions: Annotated[
        Path | None, typer.Option(help="JSONL of 'question' and 'answer': how far answers agree with the base model's.")
    ] = None,
    question_cases: Annotated[int, typer.Option(help="Questions to ask, from the file's first on.")] = 200,
    out: Annotated[Path | None, typer.Option(help="JSON file; the plot goes beside it, with .png.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what adapters cost: NLL, needles found, bytes held; dense, adapters and training-free policies."""
    from octavo.models import find_adapters
    from octavo.retrofit.agreement import AgreementSettings, read_questions
    from octavo.retrofit.command import run_evaluation, write_text
    from octavo.retrofit.entries import together
    from octavo.retrofit.evaluate import EvaluationSettings, skip_points

    sizes = numbers("--lengths", lengths, int)
    settings = EvaluationSettings(
        nll_length=nll_length, nll_from=nll_from, texts=texts, lengths=sizes, cases=cases, batch=batch,
        baselines=baselines, answers=AgreementSettings(question_cases),
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
        from octavo import plots

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
    from octavo.finding import load_adapter
    from octavo.models import save_published
    from octavo.swiftkv import SwiftKVAdapter

    found = load_adapter(adapter)
    if not isinstance(found, SwiftKVAdapter):
        raise ConfigError(f"{adapter} is a set of DMS gates; give a SwiftKV adapter")
    loaded, tokenizer = load_plain(model, dtype, "cpu")
    save_published(loaded, found, out, tokenizer, dtype=dtype_of(dtype))
    console.print(f"wrote {out}")
