"""How long a step takes: prompts are read, all requests run, then steps in which all of them get a token are timed."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import octavo
from octavo.bench.energy import joules, per_token
from octavo.bench.engine.subjects import Subject
from octavo.errors import ConfigError

SETTLING = 12  # steps before the timed ones, in which graphs are captured
SPARE = 8  # tokens that a request may still have when it was timed, so that none ends early
FIRST = 1000  # number of the first prompt that is read for its first token alone
STORE = 2**37  # bytes for prompts that are read once and then taken from a store; only what is used is taken


@dataclass(frozen=True)
class Step:
    """One measurement. Times in milliseconds; bytes that a step must read, and the share of its time that takes.

    `joules` of the GPU for each token; None where they were not counted. `distinct`: different prompts among the batch.
    """

    name: str
    batch: int
    context: int
    prefill_ms: float
    decode_ms: float
    weight_bytes: int
    kv_bytes: int
    of_floor: float
    joules: float | None = None
    distinct: int | None = None

    @property
    def told(self) -> str:
        """In a few words."""
        return f"{self.decode_ms:,.2f} ms a step"


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters that a step reads whole: all but an embedding table that is not the output layer's."""
    table: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = output is not None and output.weight is table.weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else table.weight.nbytes)


def check_lengths(model: PreTrainedModel, sizes: Sequence[tuple[int, int]], steps: int) -> None:
    """Raise ConfigError where requests of some (batch, context) would end for want of positions before all steps."""
    config: Any = model.config
    for batch, context in sizes:
        most, wanted = config.max_position_embeddings, context + answer_length(batch, steps)
        if wanted > most:
            raise ConfigError(
                f"{batch} x {context:,} with {steps} steps needs {wanted:,} positions, and the model has {most:,}; "
                "make --sizes or --steps smaller"
            )


def answer_length(batch: int, steps: int) -> int:
    """Tokens that a request may get: the first has one for each prompt that is read after its own."""
    return batch + SETTLING + steps + SPARE


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written: the best of some runs over memory that no cache holds."""
    x = torch.empty(2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    y, best = torch.empty_like(x), 0.0
    for _ in range(8):
        began = now(device)
        y.copy_(x)
        best = max(best, 2 * x.nbytes / (now(device) - began))
    return best


def engine_step(
    name: str, subject: Subject, batch: int, context: int, steps: int, bandwidth: float,
    distinct: int | None = None, **settings: Any,
) -> Step:  # fmt: skip
    """`batch` requests with prompts of `context` tokens in an engine; `settings` go to `octavo.attach`.

    Where fewer than `batch` prompts are `distinct`, the others are taken from a reuse store into pages of their own.
    """
    model, device = subject.model, subject.model.device
    distinct = min(batch, distinct or batch)
    if distinct < batch:
        settings["reuse"] = octavo.ReuseStore(memory=STORE)
    free()
    octavo.attach(model, **settings)
    try:
        engine = octavo.LLM(model, max_batch=batch, step_tokens=context + batch).engine  # a prompt is read in one step
        params = octavo.SamplingParams(temperature=0.0, max_tokens=answer_length(batch, steps), ignore_eos=True)
        prefill, requests = _first_token(engine, subject, context, device), []
        for i in range(batch):
            requests.append(engine.add(_prompt(subject, i % distinct, context), params))
            while engine.scheduler.waiting or engine.scheduler.prefilling:
                engine.step()
            requests[-1].reading = None  # what it will have read at its end is not stored
        for _ in range(SETTLING):
            engine.step()
        for request in requests:
            if request.output.error is not None:
                raise request.output.error
        kv = engine.runner.read_nbytes
        seconds, used = _measured(device, batch, steps, engine.step)
        assert len(engine.runner.running) == batch, "requests ended before all steps were timed"
        for request in requests:
            engine.cancel(request)
        return _step(name, model, (batch, context), prefill, seconds, kv, bandwidth, used, distinct)
    finally:
        octavo.detach(model)


def _first_token(engine: Any, subject: Subject, context: int, device: torch.device) -> float:
    """Seconds until a prompt that runs alone has its first token: the best of five, each another prompt."""
    best, params = float("inf"), octavo.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for i in range(5):  # of which the third captures a graph
        began = now(device)
        engine.add(_prompt(subject, FIRST + i, context), params)
        while engine.unfinished:
            engine.step()
        best = min(best, now(device) - began)
    return best


@torch.no_grad()
def plain_step(subject: Subject, batch: int, context: int, steps: int, bandwidth: float) -> Step:
    """The same prompts in the unattached model, with transformers' `DynamicCache` and SDPA."""
    model, device = subject.model, subject.model.device
    free()
    ids = torch.tensor([_prompt(subject, i, context) for i in range(batch)], device=device)
    cache, token = DynamicCache(), ids[:, :0]
    prefills = []
    for _ in range(2):
        began, warm = now(device), DynamicCache()
        model(input_ids=ids[:1], past_key_values=warm, logits_to_keep=1)
        prefills.append(now(device) - began)
    for i in range(0, context, 2048):
        token = model(input_ids=ids[:, i : i + 2048], past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)

    for _ in range(SETTLING):
        step()
    seconds, used = _measured(device, batch, steps, step)
    layers: Any = cache.layers
    kv: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return _step("unattached", model, (batch, context), min(prefills), seconds, kv, bandwidth, used, batch)


def _step(
    name: str, model: PreTrainedModel, size: tuple[int, int], prefill: float, decode: float, kv: int, bandwidth: float,
    used: float | None, distinct: int,
) -> Step:  # fmt: skip
    """`size`: batch and context; `prefill` and `decode` in seconds."""
    weights = weight_bytes(model)
    share = (weights + kv) / bandwidth / decode
    return Step(name, *size, 1000 * prefill, 1000 * decode, weights, kv, share, used, distinct)


def _measured(device: torch.device, batch: int, steps: int, step: Callable[[], None]) -> tuple[float, float | None]:
    """(seconds of a step, joules of the GPU for each of its `batch` tokens, None where they were not counted)."""
    before, began = joules(device), now(device)
    seconds = _timed(device, steps, step)
    return seconds, per_token(before, joules(device), now(device) - began, batch * 3 * max(1, steps // 3))


def _timed(device: torch.device, steps: int, step: Callable[[], None]) -> float:
    """Seconds of a step: the median of three runs of a third of them each, since hosts are now and then interrupted."""
    runs, each = [], max(1, steps // 3)
    for _ in range(3):
        began = now(device)
        for _ in range(each):
            step()
        runs.append((now(device) - began) / each)
    return statistics.median(runs)


def _prompt(subject: Subject, i: int, context: int) -> list[int]:
    """Tokens of the text from another place for each request; random ones where the model is no real one."""
    if subject.random_weights:
        rng = torch.Generator().manual_seed(i)
        most: int = subject.model.config.vocab_size
        return torch.randint(most, (context,), generator=rng).tolist()  # type: ignore[no-any-return]
    text = subject.text.repeat(-(-(context + 97 * (i + 1)) // len(subject.text)))
    return text[97 * i : 97 * i + context].tolist()  # type: ignore[no-any-return]


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free() -> None:
    """Give back what an earlier measurement has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
