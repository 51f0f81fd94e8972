"""The commands of `octavo retrofit`."""

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.terminal import Device, Dtype, Model, adapters_of, check_writable, console, load_plain, numbers
from octavo.errors import ConfigError

app = typer.Typer(help="Train adapters for a model.", no_args_is_help=True)

PROMPTS = 2000  # made up where none are given
LIMIT, SHARES = 0.04, "0.17,0.27,0.33,0.4,0.5"  # of --search

Out = Annotated[Path, typer.Argument(help="Folder for the run and, at its end, the adapter.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text, JSONL (.xz, .gz) or .npy token file to train on beside what the model samples; may be repeated. "
        "'path:share' weighs a mix, in which the sampled text has a share of 1."
    ),
]
Sampled = Annotated[
    bool, typer.Option("--sampled/--no-sampled", help="Whether the model writes text to be trained on; needs no data.")
]
SampleTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that it writes, kept in OUT; if left out, an eighth of those trained on (steps x batch x length), "
        "2,000,000 at most (250,000 on a CPU), read again where that is not enough."
    ),
]
Target = Annotated[
    float | None, typer.Option(help="Tokens per kept token to train for; 8, or --init's gates', if left out.")
]
Window = Annotated[
    int | None, typer.Option(help="Tokens a marked one stays visible; 256, or --init's gates', if left out.")
]
Skip = Annotated[float | None, typer.Option(help="Share of layers to skip at least; 0.33, or --init's, if left out.")]
KvLayers = Annotated[int | None, typer.Option(help="Layers that keep their own keys and values, instead of --skip.")]
Group = Annotated[int | None, typer.Option(help="Skipped layers that share keys and values; 1, or --init's.")]
Before = Annotated[
    int | None,
    typer.Option(help="Numbers that each token hands to the next, for half of the layers skipped; 0, or --init's."),
]
Temperature = Annotated[float, typer.Option(help="Of the KL; 2 in the paper, 1 learns faster here.")]
MseWeight = Annotated[float, typer.Option(help="Of the error of the hidden states before the last layer.")]
Start = Annotated[str, typer.Option(help="'regression' fits keys and values first; 'published' averages.")]
Batch = Annotated[int, typer.Option(help="Sequences per step over all processes.")]
MicroBatch = Annotated[int, typer.Option(help="Sequences per forward; each is held to the target of gates.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
Recall = Annotated[float, typer.Option(help="Share of the data with hidden facts and questions.")]
Exercises = Annotated[
    float | None,
    typer.Option(
        help="Share made from the text: copy, quote, edit, look up; 0.4, or what --recall leaves, if left out."
    ),
]
Init = Annotated[list[str] | None, typer.Option(help="Adapter to start from; may be repeated, one of each kind.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")]
HeldOut = Annotated[Path | None, typer.Option(help="Text for the evaluation at the end.")]
Name = Annotated[str | None, typer.Option(help="The adapter's name; the folder's if left out.")]


@app.command()
def dms(
    out: Out,
    data: Data = None,
    sampled: Sampled = True,
    sample_tokens: SampleTokens = None,
    model: Model = None,
    target: Target = None,
    steps: int = 200,
    batch: Batch = 8,
    micro_batch: MicroBatch = 4,
    length: Length = 8192,
    window: Window = None,
    shift: Annotated[int, typer.Option(help="1 reads a mark one token later, as NVIDIA's layout does.")] = 0,
    lr: float = 2e-4,
    recall: Recall = 0.1,
    exercises: Exercises = None,
    seed: int = 0,
    init: Annotated[str | None, typer.Option(help="Adapter to start from.")] = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil eviction gates for a model, from text that it samples itself, from yours, or both."""
    from octavo.cli.training import train
    from octavo.cli.training_text import TrainingText
    from octavo.retrofit.settings import GateSettings, RetrofitSettings, exercises_for, gates_for

    text = TrainingText(data or [], sampled, sample_tokens)
    start = adapters_of([init] if init else [])
    settings = RetrofitSettings(
        GateSettings(*gates_for(target, window, start), lr, shift=shift),
        steps=steps, batch=batch, micro_batch=micro_batch, length=length, recall=recall, seed=seed,
        exercises=exercises_for(recall, exercises),
    )  # fmt: skip
    loaded, tokenizer = load_plain(model, dtype, device)
    train(loaded, tokenizer, text, settings, out, name, start, resume, held_out, console)


@app.command()
def swiftkv(
    out: Out,
    data: Data = None,
    sampled: Sampled = True,
    sample_tokens: SampleTokens = None,
    model: Model = None,
    skip: Skip = None,
    kv_layers: KvLayers = None,
    group: Group = None,
    before: Before = None,
    steps: int = 900,
    batch: Batch = 32,
    micro_batch: MicroBatch = 16,
    length: Length = 2048,
    lr: float = 4e-3,
    temperature: Temperature = 1.0,
    mse_weight: MseWeight = 0.0,
    start: Start = "regression",
    recall: Recall = 0.1,
    exercises: Exercises = None,
    seed: int = 0,
    init: Init = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    search: Annotated[bool, typer.Option("--search", help="Distil several shares shortly and recommend one.")] = False,
    limit: Annotated[float | None, typer.Option(help=f"Loss of NLL that --search allows; {LIMIT} if left out.")] = None,
    shares: Annotated[str | None, typer.Option(help=f"Shares that --search tries; {SHARES} if left out.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil weights with which prompt tokens skip the later layers (SwiftKV)."""
    from octavo.cli.training import find_skip, train
    from octavo.cli.training_text import TrainingText
    from octavo.retrofit.settings import RetrofitSettings, SwiftSettings, before_for, exercises_for, shape_for

    if search and (skip is not None or kv_layers is not None or init or name is not None):
        raise ConfigError("--search takes --shares and --group, not --skip, --kv-layers, --init or --name")
    if not search and (limit is not None or shares is not None):
        raise ConfigError("--limit and --shares are for --search; give it too, or --skip for one share")
    tried = numbers("--shares", SHARES if shares is None else shares, float)
    text = TrainingText(data or [], sampled, sample_tokens)
    adapters = adapters_of(init or [])
    loaded, tokenizer = load_plain(model, dtype, device)
    layers = loaded.config.num_hidden_layers
    shape, handed = shape_for(layers, skip, kv_layers, group, adapters), before_for(before, adapters)
    settings = RetrofitSettings(
        None,
        SwiftSettings(*shape, lr=lr, temperature=temperature, mse_weight=mse_weight, start=start, before=handed),
        steps=steps, batch=batch, micro_batch=micro_batch, length=length, recall=recall, seed=seed,
        checkpoint_every=100, exercises=exercises_for(recall, exercises),
    )  # fmt: skip
    if search:
        allowed = LIMIT if limit is None else limit
        find_skip(loaded, tokenizer, text, settings, tried, out, resume, held_out, allowed, console)
    else:
        train(loaded, tokenizer, text, settings, out, name, adapters, resume, held_out, console)


@app.command("swiftkv+dms")
def swiftkv_and_dms(
    out: Out,
    data: Data = None,
    sampled: Sampled = True,
    sample_tokens: SampleTokens = None,
    model: Model = None,
    skip: Skip = None,
    kv_layers: KvLayers = None,
    group: Group = None,
    before: Before = None,
    target: Target = None,
    steps: int = 200,
    batch: Batch = 8,
    micro_batch: MicroBatch = 4,
    length: Length = 8192,
    window: Window = None,
    lr: Annotated[float, typer.Option(help="Of the SwiftKV weights; 0 leaves those of --init as they are.")] = 1e-3,
    gates_lr: Annotated[float, typer.Option(help="Of the gates.")] = 2e-4,
    temperature: Temperature = 1.0,
    mse_weight: MseWeight = 0.0,
    start: Start = "regression",
    recall: Recall = 0.1,
    exercises: Exercises = None,
    seed: int = 0,
    init: Init = None,
    resume: Resume = False,
    held_out: HeldOut = None,
    name: Name = None,
    gates_name: Annotated[
        str | None, typer.Option(help="The gates' name; --init's if it and --target are left out, else dms-<target>x.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Distil SwiftKV weights and eviction gates together; the gates go to a folder inside the adapter's."""
    from octavo.cli.training import train
    from octavo.cli.training_text import TrainingText
    from octavo.retrofit.settings import (
        GateSettings,
        RetrofitSettings,
        SwiftSettings,
        before_for,
        exercises_for,
        gates_for,
        gates_name_for,
        shape_for,
    )

    text = TrainingText(data or [], sampled, sample_tokens)
    adapters = adapters_of(init or [])
    loaded, tokenizer = load_plain(model, dtype, device)
    shape = shape_for(loaded.config.num_hidden_layers, skip, kv_layers, group, adapters)
    handed, gates_name = before_for(before, adapters), gates_name_for(gates_name, target, adapters)
    settings = RetrofitSettings(
        GateSettings(*gates_for(target, window, adapters), gates_lr),
        SwiftSettings(*shape, lr=lr, temperature=temperature, mse_weight=mse_weight, start=start, before=handed),
        steps=steps, batch=batch, micro_batch=micro_batch, length=length, recall=recall, seed=seed,
        exercises=exercises_for(recall, exercises),
    )  # fmt: skip
    train(loaded, tokenizer, text, settings, out, name, adapters, resume, held_out, console, gates_name)


@app.command()
def tokens(
    out: Annotated[Path, typer.Argument(help="Token file to write; ends with .npy.")],
    data: Annotated[Path, typer.Option(help="Text or JSONL (.xz, .gz).")],
    model: Model = None,
    limit: Annotated[int | None, typer.Option(help="Tokens to take, from all of the text; all if left out.")] = None,
    seed: int = 0,
) -> None:
    """Tokenise text once, or a sample of it, for training elsewhere."""
    from octavo.retrofit.token_files import sampled, write_tokens

    check_writable(out)
    _, tokenizer = load_plain(model, None, "cpu")
    taken = sampled(data, tokenizer, limit, seed)
    write_tokens(taken, out)
    console.print(f"{len(taken):,} tokens in {out}")


@app.command()
def chats(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL with 'prompt', 'question', 'instruction' or 'text'; made-up prompts if left out."),
    ] = None,
    model: Model = None,
    limit: Annotated[
        int | None, typer.Option(help=f"Prompts to answer; all of the file's, or {PROMPTS} made up, if left out.")
    ] = None,
    batch: int = 64,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write chats in the model's own words, for training data."""
    from rich.progress import Progress

    from octavo.retrofit.chats import read_prompts, write_chats
    from octavo.retrofit.prompts import made_prompts

    if prompts is not None and out.resolve() == prompts.resolve():
        raise ConfigError(f"{out} holds the prompts; write the chats to another file")
    check_writable(out)
    asked = made_prompts(PROMPTS if limit is None else limit, seed) if prompts is None else read_prompts(prompts, limit)
    loaded, tokenizer = load_plain(model, dtype, device)
    with Progress(console=console) as bar:
        task = bar.add_task("answering", total=len(asked))
        write_chats(
            loaded, tokenizer, asked, out, batch=batch, max_new_tokens=max_new_tokens, seed=seed,
            on_batch=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
