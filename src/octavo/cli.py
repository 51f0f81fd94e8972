"""The command line. A user's mistake is one line on standard error and exit code 2."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from octavo.errors import ConfigError, OctavoError, OutputFileError

app = typer.Typer(
    help="Cheap LLM inference for Hugging Face models.", no_args_is_help=True, pretty_exceptions_enable=False
)
retrofit = typer.Typer(help="Train adapters for a model.", no_args_is_help=True)
app.add_typer(retrofit, name="retrofit")
with contextlib.suppress(ImportError):  # octavo.vdb is its C extension, which needs a compiler at installation
    from octavo.vdb.bench.command import app as bench
    from octavo.vdb.command import app as vdb

    app.add_typer(vdb, name="vdb")
    app.add_typer(bench, name="bench")
console = Console()
Number = TypeVar("Number", int, float)

Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file or hub id; the embedded SmolLM2-135M-Instruct if left out.")
]
AdapterName = Annotated[
    str,
    typer.Option(
        help="Folder, shipped name or hub id; two joined by '+'; 'none'; or 'auto' (dms-8x for the embedded model)."
    ),
]
Budget = Annotated[int | None, typer.Option(help="Bytes that the KV cache may take.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default what the device computes in.")]
Device = Annotated[str | None, typer.Option(help="Torch device; CUDA where there is one.")]

# Of the `retrofit` commands
Out = Annotated[Path, typer.Argument(help="Folder for the run and, at its end, the adapter.")]
Data = Annotated[list[str], typer.Option(help="Text, JSONL (.xz, .gz) or .npy token file; 'path:share' weighs a mix.")]
Target = Annotated[float, typer.Option(help="Tokens per kept token to train for.")]
Window = Annotated[int, typer.Option(help="Tokens a marked one stays visible.")]
Skip = Annotated[float | None, typer.Option(help="Share of layers to skip at least; 0.33, or --init's, if left out.")]
KvLayers = Annotated[int | None, typer.Option(help="Layers that keep their own keys and values, instead of --skip.")]
Group = Annotated[int | None, typer.Option(help="Skipped layers that share keys and values; 1, or --init's.")]
MseWeight = Annotated[float, typer.Option(help="Of the error of the hidden states before the last layer.")]
Start = Annotated[str, typer.Option(help="'regression' fits keys and values first; 'published' averages.")]
Batch = Annotated[int, typer.Option(help="Sequences per step over all processes.")]
MicroBatch = Annotated[int, typer.Option(help="Sequences per forward.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
Recall = Annotated[float, typer.Option(help="Share of the data with hidden facts and questions.")]
Init = Annotated[list[str] | None, typer.Option(help="Adapter to start from; may be repeated, one of each kind.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")]
HeldOut = Annotated[Path | None, typer.Option(help="Text for the evaluation at the end.")]
Name = Annotated[str | None, typer.Option(help="The adapter's name; the folder's if left out.")]


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

    _check_writable(png)
    if swiftkv and adapter != "auto":
        raise ConfigError("--swiftkv names the shipped adapters; leave it out and give --adapter both, joined by '+'")
    text = read_text(file or demonstration.TEXT)
    if file is not None and not question:
        raise ConfigError("give at least one --question about your --file")
    loaded, tokenizer = _load(model, "swiftkv+dms-8x" if swiftkv else adapter, dtype, device, budget)
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
    """Talk to a model; the cache lives on between turns. An empty line or Ctrl-D ends the chat."""
    from octavo.chat import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = _load(model, adapter, dtype, device, budget)
    conversation = Conversation(loaded, tokenizer, sampling)
    while True:
        try:
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

    text = prompt if prompt is not None else sys.stdin.read()
    if file is not None:
        text = f"{read_text(file)}\n\n{text}"
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = _load(model, adapter, dtype, device, budget)
    conversation = Conversation(loaded, tokenizer, sampling)
    for piece in conversation.complete(text) if raw else conversation.ask(text):
        print(piece, end="", flush=True)
    print()


@retrofit.command()
def dms(
    out: Out,
    data: Data,
    model: Model = None,
    target: Target = 8.0,
    steps: int = 200,
    batch: Batch = 8,
    micro_batch: MicroBatch = 4,
    length: Length = 8192,
    window: Window = 256,
    lr: float = 2e-4,
    recall: Recall = 0.25,
    seed: int = 0,
    init: Annotated[str | None, typer.Option(help="Adapter to start from.")] = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil eviction gates for a model from text."""
    from octavo.retrofit.command import train
    from octavo.retrofit.settings import GateSettings, RetrofitSettings

    settings = RetrofitSettings(
        GateSettings(target, window, lr), steps=steps, batch=batch, micro_batch=micro_batch, length=length,
        recall=recall, seed=seed,
    )  # fmt: skip
    start = _adapters([init] if init else [])
    loaded, tokenizer = _load_plain(model, dtype, device)
    train(loaded, tokenizer, data, settings, out, name or out.name, start, resume, held_out, console)


@retrofit.command()
def swiftkv(
    out: Out,
    data: Data,
    model: Model = None,
    skip: Skip = None,
    kv_layers: KvLayers = None,
    group: Group = None,
    steps: int = 1000,
    batch: Batch = 64,
    micro_batch: MicroBatch = 16,
    length: Length = 2048,
    lr: float = 5e-4,
    mse_weight: MseWeight = 1.0,
    start: Start = "regression",
    recall: Recall = 0.25,
    seed: int = 0,
    init: Init = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    search: Annotated[bool, typer.Option("--search", help="Distil several shares shortly and recommend one.")] = False,
    limit: Annotated[float, typer.Option(help="Loss of NLL that --search allows.")] = 0.04,
    shares: Annotated[str, typer.Option(help="Shares of layers that --search skips.")] = "0.17,0.27,0.33,0.4,0.5",
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil weights with which prompt tokens skip the later layers (SwiftKV)."""
    from octavo.retrofit.command import find_skip, train
    from octavo.retrofit.settings import RetrofitSettings, SwiftSettings, shape_for

    tried = _numbers("--shares", shares, float)
    adapters = _adapters(init or [])
    loaded, tokenizer = _load_plain(model, dtype, device)
    layers = loaded.config.num_hidden_layers
    if search and (skip is not None or kv_layers is not None or adapters):
        raise ConfigError("--search takes --shares and --group, not --skip, --kv-layers or --init")
    shape = shape_for(layers, skip, kv_layers, group, adapters)
    settings = RetrofitSettings(
        None, SwiftSettings(*shape, lr=lr, mse_weight=mse_weight, start=start), steps=steps, batch=batch,
        micro_batch=micro_batch, length=length, recall=recall, seed=seed, checkpoint_every=100,
    )  # fmt: skip
    if search:
        find_skip(loaded, tokenizer, data, settings, tried, out, resume, held_out, limit, console)
    else:
        train(loaded, tokenizer, data, settings, out, name or out.name, adapters, resume, held_out, console)


@retrofit.command("swiftkv+dms")
def swiftkv_and_dms(
    out: Out,
    data: Data,
    model: Model = None,
    skip: Skip = None,
    kv_layers: KvLayers = None,
    group: Group = None,
    target: Target = 8.0,
    steps: int = 200,
    batch: Batch = 8,
    micro_batch: MicroBatch = 4,
    length: Length = 8192,
    window: Window = 256,
    lr: Annotated[float, typer.Option(help="Of the SwiftKV weights; 0 leaves those of --init as they are.")] = 2e-4,
    gates_lr: Annotated[float, typer.Option(help="Of the gates.")] = 2e-4,
    mse_weight: MseWeight = 1.0,
    start: Start = "regression",
    recall: Recall = 0.25,
    seed: int = 0,
    init: Init = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    gates_name: Annotated[str | None, typer.Option(help="The gates' name; dms-<target>x if left out.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil SwiftKV weights and eviction gates together; the gates go to a folder inside the adapter's."""
    from octavo.retrofit.command import train
    from octavo.retrofit.settings import GateSettings, RetrofitSettings, SwiftSettings, shape_for

    adapters = _adapters(init or [])
    loaded, tokenizer = _load_plain(model, dtype, device)
    shape = shape_for(loaded.config.num_hidden_layers, skip, kv_layers, group, adapters)
    settings = RetrofitSettings(
        GateSettings(target, window, gates_lr), SwiftSettings(*shape, lr=lr, mse_weight=mse_weight, start=start),
        steps=steps, batch=batch, micro_batch=micro_batch, length=length, recall=recall, seed=seed,
    )  # fmt: skip
    train(loaded, tokenizer, data, settings, out, name or out.name, adapters, resume, held_out, console, gates_name)


@retrofit.command()
def chats(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with 'prompt', 'question', 'instruction' or 'text'.")],
    model: Model = None,
    limit: Annotated[int | None, typer.Option(help="Prompts to answer; all if left out.")] = None,
    batch: int = 64,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write chats in the model's own words, for training data."""
    from rich.progress import Progress

    from octavo.retrofit.chats import read_prompts, write_chats

    _check_writable(out)
    asked = read_prompts(prompts, limit)
    loaded, tokenizer = _load_plain(model, dtype, device)
    with Progress(console=console) as bar:
        task = bar.add_task("answering", total=len(asked))
        write_chats(
            loaded, tokenizer, asked, out, batch=batch, max_new_tokens=max_new_tokens, seed=seed,
            on_batch=lambda done: bar.update(task, completed=done),
        )  # fmt: skip


@app.command()
def evaluate(
    text: Annotated[Path, typer.Argument(help="Running text that the adapters were not trained on.")],
    model: Model = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter to measure, or two joined by '+'; may be repeated. dms-8x by default."),
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
    out: Annotated[Path | None, typer.Option(help="JSON file; the plot goes beside it.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure what adapters cost: NLL, needles found, bytes held; dense, adapters and training-free policies."""
    from octavo.models import find_adapters
    from octavo.retrofit.agreement import AgreementSettings, read_questions
    from octavo.retrofit.command import run_evaluation
    from octavo.retrofit.entries import together
    from octavo.retrofit.evaluate import EvaluationSettings, skip_points

    sizes = _numbers("--lengths", lengths, int)
    settings = EvaluationSettings(
        nll_length=nll_length, nll_from=nll_from, texts=texts, lengths=sizes, cases=cases, batch=batch,
        baselines=baselines, answers=AgreementSettings(question_cases),
    )  # fmt: skip
    if out is not None:
        _check_writable(out)
    asked = read_questions(questions, question_cases) if questions else []
    adapters = [together(find_adapters(name)) for name in adapter or (["dms-8x"] if model is None else [])]
    loaded, tokenizer = _load_plain(model, dtype, device)
    result = run_evaluation(loaded, tokenizer, text, adapters, settings, console, asked)
    if out is not None:
        from octavo import plots

        out.write_text(json.dumps(result.to_json(), indent=2) + "\n")
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
    from octavo.models import find_adapter, save_published
    from octavo.swiftkv import SwiftKVAdapter

    found = find_adapter(adapter)
    if not isinstance(found, SwiftKVAdapter):
        raise ConfigError(f"{adapter} is a set of DMS gates; give a SwiftKV adapter")
    loaded, tokenizer = _load_plain(model, dtype, "cpu")
    save_published(loaded, found, out, tokenizer, dtype=_dtype(dtype))
    console.print(f"wrote {out}")


def _load(
    model: str | None, adapter: str, dtype: str | None, device: str | None, budget: int | None
) -> tuple[Any, Any]:
    from octavo.models import load

    _quiet()
    with console.status("loading the model"):
        return load(model, None if adapter == "none" else adapter, dtype=_dtype(dtype), device=device, budget=budget)


def _load_plain(model: str | None, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    from octavo.models import load_plain

    _quiet()
    with console.status("loading the model"):
        return load_plain(model, dtype=_dtype(dtype), device=device)


def _adapters(names: list[str]) -> list[Any]:
    from octavo.models import find_adapters

    return find_adapters(names)


def _numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(n) for n in text.split(",") if n.strip())
    except ValueError as e:
        raise ConfigError(f"{option} takes numbers separated by commas, not {text!r}") from e


def _dtype(name: str | None) -> Any:
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    if name not in known:
        raise ConfigError(f"dtype must be bf16, fp16 or fp32, not {name}")
    return known[name]


def _quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _check_writable(path: Path) -> None:
    """Raise OutputFileError now rather than after minutes of work."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror}") from e
