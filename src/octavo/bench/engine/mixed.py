"""Many requests of different lengths at once: tokens per second of the engine, `generate` and `generate_batch`."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

import octavo
from octavo.bench.energy import joules, per_token
from octavo.bench.engine.steps import free, now
from octavo.bench.engine.subjects import Subject
from octavo.errors import ConfigError


@dataclass(frozen=True)
class Load:
    """Requests: (prompt tokens, new tokens) each."""

    prompts: list[list[int]]
    new: list[int]

    @property
    def generated(self) -> int:
        """New tokens of all requests."""
        return sum(self.new)


@dataclass(frozen=True)
class Run:
    """One way through a load. `seconds` of all of it, `kv_bytes` the most that was held; None: not known."""

    name: str
    seconds: float
    tokens: int
    kv_bytes: int | None
    joules: float | None = None  # of the GPU for each new token

    @property
    def rate(self) -> float:
        """New tokens per second."""
        return self.tokens / self.seconds

    @property
    def told(self) -> str:
        """In a few words."""
        return f"{self.rate:,.0f} tokens/s"


def load_of(subject: Subject, requests: int, prompt: tuple[int, int], new: tuple[int, int], seed: int = 0) -> Load:
    """Random lengths within these bounds, the prompts pieces of the subject's text.

    Raises ConfigError where the longest have no room in the model's positions.
    """
    config: Any = subject.model.config
    if prompt[1] + new[1] > config.max_position_embeddings:
        raise ConfigError(
            f"prompts of {prompt[1]:,} tokens with answers of {new[1]:,} need more than the model's "
            f"{config.max_position_embeddings:,} positions; make --prompts or --answers smaller"
        )
    rng = random.Random(seed)
    text: list[int] = subject.text.tolist()
    while len(text) < 2 * prompt[1]:
        text += text
    prompts, lengths = [], []
    for _ in range(requests):
        n = rng.randint(*prompt)
        at = rng.randrange(len(text) - n)
        prompts.append(text[at : at + n])
        lengths.append(rng.randint(*new))
    return Load(prompts, lengths)


def in_engine(name: str, subject: Subject, load: Load, max_batch: int, **settings: Any) -> Run:
    """All requests at once in an engine; `settings` go to `octavo.attach`."""
    model = subject.model
    free()
    octavo.attach(model, **settings)
    try:
        engine = octavo.LLM(model, max_batch=max_batch).engine
        _drain(engine, load, 0.02)  # compiles, and captures some graphs
        before, began = joules(model.device), now(model.device)
        peak = _drain(engine, load, 1.0)
        return _run(name, model.device, began, before, load.generated, peak)
    finally:
        octavo.detach(model)


def _drain(engine: Any, load: Load, share: float) -> int:
    """Run the load, or the same requests with a share of their new tokens; the most bytes that were held."""
    requests = [
        engine.add(
            prompt, octavo.SamplingParams(temperature=0.0, max_tokens=_part(share, new), ignore_eos=True)
        )
        for prompt, new in zip(load.prompts, load.new, strict=True)
    ]  # fmt: skip
    peak: int = 0
    while engine.unfinished:
        engine.step()
        peak = max(peak, engine.kv_nbytes)
    for request in requests:
        if request.output.error is not None:
            raise request.output.error
    return peak


def _part(share: float, new: int) -> int:
    """A share of a request's new tokens, at least two where it has so many."""
    return max(min(2, new), int(share * new))


@torch.no_grad()
def one_by_one(subject: Subject, load: Load) -> Run:
    """`model.generate` of the unattached model, request after request."""
    model = subject.model
    before, began = joules(model.device), now(model.device)
    for prompt, new in zip(load.prompts, load.new, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
        )
    return _run("generate, one by one", model.device, began, before, load.generated, None)


@torch.no_grad()
def continuous(subject: Subject, load: Load, **settings: Any) -> Run:
    """Transformers' own continuous batching. `settings` go to its `ContinuousBatchingConfig`.

    Raises ConfigError where it stops on its own; transformers has logged why then.
    """
    from transformers import ContinuousBatchingConfig

    model: Any = subject.model
    free()
    ends = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(load.new)
    )
    config = ContinuousBatchingConfig(**settings)
    manager = model.init_continuous_batching(generation_config=ends, continuous_batching_config=config)
    manager.start()
    try:
        _served(manager, load, 0.02)
        before, began = joules(model.device), now(model.device)
        tokens = _served(manager, load, 1.0)
        return _run("generate_batch", model.device, began, before, tokens, None)
    finally:
        manager.stop(block=True)


def _run(name: str, device: torch.device, began: float, before: float | None, tokens: int, peak: int | None) -> Run:
    """What has been measured since `began`, when the GPU had used `before` joules."""
    seconds = now(device) - began
    return Run(name, seconds, tokens, peak, per_token(before, joules(device), seconds, tokens))


def _served(manager: Any, load: Load, share: float) -> int:
    """Send all requests and wait for their ends; tokens that came."""
    for i, (prompt, new) in enumerate(zip(load.prompts, load.new, strict=True)):
        manager.add_request(prompt, request_id=f"{share}-{i}", max_new_tokens=_part(share, new))
    waiting, tokens = len(load.prompts), 0
    while waiting:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            waiting -= 1
            tokens += len(result.generated_tokens)
        elif result is None and not manager.is_running():
            raise ConfigError("generate_batch has stopped before its requests were done; leave it out with --no-plain")
    return tokens
