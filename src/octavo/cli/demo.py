"""The demonstration: a model answers questions about a long text in a fraction of the KV memory.

The same text and questions go through the model twice, with Octavo and without, in one process; the table holds
both. Then a fresh process answers the first question once more, from what the first one left on disk. Every figure that
is printed is measured in the run.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import attachment_of, require_attachment
from octavo.attachment.attach import detach, restore
from octavo.cli.chat import Conversation, Sampling
from octavo.cli.plots import heat_map, heat_map_text
from octavo.retrofit.results import share_text

TEXT = Path(__file__).parent / "texts" / "demo.txt"
QUESTIONS = (
    "What is the number of the steamer trunk that Valentin left at Liverpool Street?",
    "What is the telephone number of the little hotel?",
    "What is the name of the night clerk?",
)
INSTRUCTION = "Read the text and answer the question after it.\n\n{text}\n\n{question}"


@dataclass(frozen=True)
class Reading:
    """One pass over the text and the questions; seconds are wall time, `times[i]` from question to last token."""

    answers: list[str]
    prompt_tokens: int
    prefill_s: float
    decoded_tokens: int
    decode_s: float
    times: list[float]
    nbytes: int
    dense_nbytes: int
    share: Tensor | None  # [layers, kv_heads], share of tokens kept


def run(
    model: PreTrainedModel, tokenizer: Any, text: str, questions: Sequence[str], console: Console, png: Path
) -> tuple[Reading, Reading]:
    """Read with the attached model, then with the same model detached, print both, write the heat map to `png`.

    Returns (with Octavo, without). The model is attached again at the end.
    """
    attachment = attachment_of(model)
    assert attachment is not None
    name = " + ".join(a.name for a in attachment.adapters) or "no eviction"
    warm_up(model, tokenizer)
    pages = f", {attachment.settings.kv_dtype} pages" if attachment.settings.kv_dtype else ""
    title = escape(str(model.config._name_or_path).rsplit("/", 1)[-1])
    console.print(f"[bold]{title}[/bold], {model.dtype}{pages}, {name}")
    if attachment.swiftkv_on and attachment.swiftkv is not None:
        spec = attachment.swiftkv.transform.spec
        console.print(f"SwiftKV: prompt tokens skip {spec.upper} of {spec.layers} layers")
    ours = read(model, tokenizer, text, questions, console, "with Octavo")
    detach(model)
    try:
        warm_up(model, tokenizer)
        plain = read(model, tokenizer, text, questions, console, "the same model without Octavo")
    finally:
        restore(model, attachment)
    console.print(table(ours, plain))
    if ours.share is not None:
        show_heat_map(ours.share, console, png)
    return ours, plain


def read(
    model: PreTrainedModel, tokenizer: Any, text: str, questions: Sequence[str], console: Console, title: str
) -> Reading:
    """Ask all questions in one conversation, streaming the answers."""
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=48))
    console.rule(title)
    answers, times, prompt, prefill, decoded, decode = [], [], 0, 0.0, 0, 0.0
    for i, question in enumerate(questions):
        console.print(f"[bold cyan]{escape(question)}[/bold cyan]")
        began = time.perf_counter()
        with Progress(TextColumn("reading"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,} tokens"),
                      TimeElapsedColumn(), console=console, transient=True) as bar:  # fmt: skip
            task = bar.add_task("", total=1)
            turn = INSTRUCTION.format(text=text, question=question) if i == 0 else question
            show = partial(_show_progress, bar, task)
            pieces = conversation.ask(turn, show)
        read_at, start = time.perf_counter(), len(conversation.ids)
        if i == 0:
            prompt, prefill = start, read_at - began
        answer = ""
        for piece in pieces:
            console.print(piece, end="", markup=False, highlight=False)
            answer += piece
        console.print()
        done = time.perf_counter()
        decoded, decode = decoded + len(conversation.ids) - start, decode + done - read_at
        answers.append(answer)
        times.append(done - began)
    return _reading(model, conversation, answers, prompt, prefill, decoded, decode, times)


def again(
    model: PreTrainedModel, options: dict[str, Any], folder: Path, text: str, question: str, ours: Reading,
    console: Console,
) -> None:  # fmt: skip
    """Ask the first question once more in a process of its own, which finds what was read in the folder of the store.

    `options` are those that `octavo.cli.terminal.load` takes.
    """
    store: Any = require_attachment(model).reuse
    store.close()
    console.rule("the same question in a fresh process, from disk")
    asked = json.dumps({"options": options, "folder": str(folder), "text": text, "question": question})
    code = "from octavo.cli.demo import answer_again; answer_again()"
    run = subprocess.run([sys.executable, "-c", code], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    console.print(found["answer"], markup=False, highlight=False)
    console.print(
        f"{found['reused']:,} of {found['prompt']:,} prompt tokens came from {store.stats().disk_nbytes:,} B on disk; "
        f"first token after {found['first_s']:.2f} s instead of {ours.prefill_s:.2f} s "
        f"({ours.prefill_s / found['first_s']:.1f}x), answer complete after {found['whole_s']:.2f} s "
        f"instead of {ours.times[0]:.2f} s; loading the model aside",
        highlight=False,
    )


def answer_again() -> None:
    """What the fresh process does: its task is JSON on standard input, its answer the last line that it prints."""
    from octavo.cli.terminal import load

    given = json.loads(sys.stdin.read())
    options = given["options"]
    model, tokenizer = load(
        options["model"], options["adapter"], options["dtype"], options["device"], None, options["kv_dtype"],
        Path(given["folder"]),
    )  # fmt: skip
    warm_up(model, tokenizer)
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=48))
    began = time.perf_counter()
    pieces = conversation.ask(INSTRUCTION.format(text=given["text"], question=given["question"]))
    first, prompt = time.perf_counter() - began, len(conversation.ids)
    answer = "".join(pieces)
    whole = time.perf_counter() - began
    found = {"answer": answer, "first_s": first, "whole_s": whole, "prompt": prompt, "reused": conversation.reused}
    print(json.dumps(found))


def _show_progress(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def warm_up(model: PreTrainedModel, tokenizer: Any) -> None:
    """One short forward, so that first-call costs stay out of the figures."""
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        model(input_ids=ids)


def table(ours: Reading, plain: Reading) -> Table:
    """Both readings side by side."""
    out = Table("", "with Octavo", "without", "ratio", title=f"{ours.prompt_tokens:,} prompt tokens, one run of each")
    held, dense = ours.nbytes, plain.nbytes
    out.add_row("KV cache held at the end", f"{held:,} B", f"{dense:,} B", share_text(held, dense))
    for name, tokens, a, b in (
        ("prefill", ours.prompt_tokens, ours.prefill_s, plain.prefill_s),
        ("decode", ours.decoded_tokens, ours.decode_s, plain.decode_s),
    ):
        rate, other = tokens / a, (tokens if name == "prefill" else plain.decoded_tokens) / b
        out.add_row(name, f"{rate:,.1f} tokens/s", f"{other:,.1f} tokens/s", f"{rate / other:.2f}x")
    for i, (a, b) in enumerate(zip(ours.times, plain.times, strict=True), 1):
        out.add_row(f"answer {i} complete after", f"{a:.2f} s", f"{b:.2f} s", f"{b / a:.2f}x")
    return out


def show_heat_map(share: Tensor, console: Console, png: Path) -> None:
    """Print how much each layer and KV head kept, and write the same as a PNG."""
    console.print(
        f"\nTokens kept, one line per KV head, one cell per layer (blank 0% to full 100%, mean {share.mean():.1%}):"
    )
    room = max(1, (console.width - len(f"head {share.shape[1] - 1} ||")) // 2)  # cells that fit into a line
    for first in range(0, len(share), room):
        part = share[first : first + room]
        if len(share) > room:
            console.print(f"cells {first} to {first + len(part) - 1} of {len(share)}:", highlight=False)
        for head, line in enumerate(heat_map_text(part)):
            console.print(f"head {head} |{line}|", markup=False, highlight=False, no_wrap=True)
    heat_map(share, png, "Share of tokens each layer and KV head kept")
    console.print(f"as a picture: {png}")


def _reading(
    model: PreTrainedModel, conversation: Conversation, answers: list[str], prompt: int, prefill: float, decoded: int,
    decode: float, times: list[float],
) -> Reading:  # fmt: skip
    cache = conversation.cache
    if attachment_of(model) is not None:
        share = cache.kept[0].float() / cache.seen
        return Reading(answers, prompt, prefill, decoded, decode, times, cache.nbytes, cache.dense_nbytes, share.cpu())
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return Reading(answers, prompt, prefill, decoded, decode, times, held, held, None)
