"""The measurements: the first token of a prompt seen before, what a miss costs, bytes, and whole traces."""

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import octavo
from octavo.attachment.prompt_graphs import OFTEN
from octavo.bench.reuse.traces import Cuts

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
QUESTION = 30  # tokens after the document
DENSE_PROMPT = 8192


@dataclass(frozen=True)
class First:
    """Seconds, medians. Of a prompt that nobody has seen, until the call returns, without a store and with an empty one
    (storing included). Of a new question about a document that was seen, until its first token is streamed, from memory
    and in fresh processes from disk, where they can load the model, and from a server, where one was given;
    `memory_call_s`: until that call returns, storing included."""

    document: int
    cold_s: float
    miss_s: float
    memory_s: float
    memory_call_s: float
    disk_s: float | None = None
    remote_s: float | None = None

    @property
    def figures(self) -> dict[str, float]:
        """All of them, and the ratios that matter."""
        taken = {"memory_ratio": self.memory_s, "disk_ratio": self.disk_s, "remote_ratio": self.remote_s}
        return {
            **{name: value for name, value in asdict(self).items() if value is not None},
            **{name: self.cold_s / seconds for name, seconds in taken.items() if seconds is not None},
            "miss_overhead": self.miss_s / self.cold_s - 1,
        }


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """Takes note when `generate` streams the first token; the prompt is streamed before it."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token, which is on the host."""
        self.times.append(self.clock())

    def end(self) -> None:
        """Called at the end."""


def first_and_whole(model: PreTrainedModel, tokens: list[int], clock: Clock = time.perf_counter) -> tuple[float, float]:
    """(seconds until the first token is streamed, until the call returns) of a greedy `generate` of one token."""
    streamer = _FirstToken(clock)
    began = clock()
    whole, _ = timed(model, tokens, clock=clock, streamer=streamer)
    return streamer.times[1] - began, whole


def timed(
    model: PreTrainedModel, tokens: list[int], new: int = 1, clock: Clock = time.perf_counter, **options: Any
) -> tuple[float, Tensor]:
    """(seconds, answer [1, T]) of a greedy `generate`; `options` go to it."""
    ids = torch.tensor([tokens], device=model.device)
    began = clock()
    generate: Any = model.generate
    count = {"min_new_tokens": new, "max_new_tokens": new}
    out = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **count, **options)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, out


def with_store(model: PreTrainedModel, store: octavo.ReuseStore | None) -> None:
    """Give an attached model another store; it was attached with one."""
    attachment: Any = model.__dict__["_octavo"]
    attachment.reuse = store


@torch.no_grad()
def _warm(model: PreTrainedModel, tokens: list[int]) -> None:
    """On a GPU, compile the kernels for a prompt and for a question after it, and capture their graphs, which processes
    do once in their life."""
    if model.device.type != "cuda":
        return
    ids = torch.tensor([tokens], device=model.device)
    for _ in range(1 + OFTEN):
        cache = octavo.KVCache(model)
        for part in (ids[:, :-QUESTION], ids[:, -QUESTION:]):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)
        model(input_ids=ids, past_key_values=octavo.KVCache(model), logits_to_keep=1)


def _settle(model: PreTrainedModel) -> None:
    """Clear the pages of the call before, so that each call pays for its own alone."""
    octavo.KVCache(model).memory.reclaim()


def first_tokens(
    model: PreTrainedModel, cuts: Cuts, document: int, rounds: int, options: dict[str, Any] | None, clock: str = "wall",
    remote: str | None = None,
) -> First:  # fmt: skip
    """See `First`; the ways take turns, so that whatever else the machine does meets all of them. `options`: with which
    a fresh process loads the model, None: it cannot. `clock`: "wall", or "cpu" for the seconds that the process itself
    had, with one thread, where others run beside it. `remote`: a server's URL, where nothing of these prompts is left.
    """
    now = CLOCKS[clock]
    cold, miss, memory, call = [], [], [], []
    disk, served = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        _warm(model, cuts.piece(document + QUESTION))
        for i in range(rounds):
            place = Path(folder) / str(i)
            text = cuts.piece(document)
            with_store(model, None)
            _settle(model)
            cold.append(timed(model, cuts.piece(document + QUESTION), clock=now)[0])
            store = octavo.ReuseStore("16GiB") if options is None else octavo.ReuseStore("1GiB", place)
            with_store(model, store)
            _settle(model)
            miss.append(timed(model, text + cuts.piece(QUESTION), clock=now)[0])
            store.flush()
            first, whole = first_and_whole(model, text + cuts.piece(QUESTION), now)
            assert store.stats().reused >= document, "the document came from the store"
            memory.append(first)
            call.append(whole)
            store.close()
            if options is None:
                continue
            task = {"options": options, "tokens": text + cuts.piece(QUESTION), "clock": clock, "document": document}
            disk.append(_elsewhere({**task, "disk": str(place)}))
            if remote is not None:
                store = octavo.ReuseStore("1GiB", remote=remote)
                with_store(model, store)
                timed(model, text + cuts.piece(QUESTION))
                store.flush()
                served.append(_elsewhere({**task, "remote": remote}))
                store.delete(prefix=text)
    medians = (statistics.median(each) for each in (cold, miss, memory, call))
    elsewhere = {name: statistics.median(each) for name, each in (("disk_s", disk), ("remote_s", served)) if each}
    return First(document, *medians, **elsewhere)


def _elsewhere(task: dict[str, Any]) -> float:
    """Seconds that a fresh process takes."""
    code = "from octavo.bench.reuse.measure import elsewhere; elsewhere()"
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["reused"] >= task["document"], "the document came from disk or the server"
    return float(found["seconds"])


def elsewhere() -> None:
    """What the fresh process does: its task is JSON on standard input."""
    task = json.loads(sys.stdin.read())
    if task.get("remote"):
        importlib.import_module("redis")  # as the model, loaded before the time is taken
    options, now = task["options"], CLOCKS[task["clock"]]
    options["dtype"] = getattr(torch, options["dtype"])
    began = now()
    store = octavo.ReuseStore(None, task.get("disk"), remote=task.get("remote"))
    opening = now() - began
    model, _ = octavo.load(**options, reuse=store)
    timed(model, task["tokens"][-40:])  # what a first call costs is no matter of the cache
    _warm(model, task["tokens"])
    seconds, _ = first_and_whole(model, task["tokens"], now)
    print(json.dumps({"seconds": seconds + opening, "reused": store.stats().reused}))


def stored_bytes(model: PreTrainedModel, cuts: Cuts) -> dict[str, float]:
    """Bytes of a stored prompt of 8,192 tokens, less where the model has fewer positions, and of a dense cache's."""
    limit = int(getattr(model.config, "max_position_embeddings", DENSE_PROMPT + 1))
    length = min(DENSE_PROMPT, limit - 1)
    store = octavo.ReuseStore("4GiB")
    with_store(model, store)
    timed(model, cuts.piece(length))
    stats, shape = store.stats(), octavo.KVCache(model).shape
    dense = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize * length
    return {"tokens": length, "stored": stats.memory_nbytes, "dense": dense, "ratio": dense / stats.memory_nbytes}
