"""`octavo chat` and `octavo generate`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.terminal import (
    AdapterName,
    Budget,
    Device,
    Dtype,
    KvDtype,
    Model,
    ReuseFolder,
    check_writable,
    console,
    load,
    reading_input,
)
from octavo.errors import CacheBudgetError, PromptError

if TYPE_CHECKING:
    from octavo.cli.chat import Conversation

app = typer.Typer()


@app.command()
def chat(
    model: Model = None,
    adapter: AdapterName = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    save: Annotated[Path | None, typer.Option(help="File for the conversation when it ends, to resume it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a conversation that --save wrote.")] = None,
    reuse: ReuseFolder = None,
    budget: Budget = None,
    kv_dtype: KvDtype = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk to a model; the cache lives on between turns. An empty line, Ctrl-D or Ctrl-C ends the chat.

    A turn that is too long is refused, and the chat goes on. A resumed chat needs the model, the adapter and the types
    that it was saved with; nothing of it is read again.
    """
    from octavo.attachment import Snapshot
    from octavo.cli.chat import Conversation, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if save is not None:
        check_writable(save, replaced=True)
    snapshot = None if resume is None else Snapshot.load(resume)
    loaded, tokenizer = load(model, adapter, dtype, device, budget, kv_dtype, reuse)
    if snapshot is None:
        conversation = Conversation(loaded, tokenizer, sampling)
    else:
        conversation = Conversation.resume(loaded, tokenizer, snapshot, sampling)
        console.print(f"[dim]going on after {len(conversation.ids):,} tokens[/dim]")
    try:
        _talk(conversation)
    finally:
        if save is not None and conversation.ids:
            conversation.save(save)
            console.print(
                f"\nsaved {len(conversation.ids):,} tokens to {save}", markup=False, highlight=False, soft_wrap=True
            )


def _talk(conversation: "Conversation") -> None:
    """Turn after turn until the user ends it."""
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
        cache, reused = conversation.cache, f", {conversation.reused:,} reused" if conversation.reused else ""
        held = f"{cache.nbytes:,} B held, dense {cache.dense_nbytes:,} B"
        console.print(f"\n[dim]{cache.seen:,} tokens{reused}, {held}[/dim]")


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
    reuse: ReuseFolder = None,
    budget: Budget = None,
    kv_dtype: KvDtype = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer one prompt, streaming."""
    from octavo.cli.chat import Conversation, Sampling
    from octavo.retrofit.data import read_text

    with reading_input():
        text = prompt if prompt is not None else sys.stdin.read()
    if file is not None:
        text = f"{read_text(file)}\n\n{text}"
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    loaded, tokenizer = load(model, adapter, dtype, device, budget, kv_dtype, reuse)
    conversation = Conversation(loaded, tokenizer, sampling)
    for piece in conversation.complete(text) if raw else conversation.ask(text):
        print(piece, end="", flush=True)
    print()
