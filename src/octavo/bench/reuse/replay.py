"""Traces of requests, answered one after another in several ways: time to first tokens, and what was computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import octavo
from octavo.bench.reuse.measure import timed, with_store
from octavo.bench.reuse.traces import ANSWER, Trace
from octavo.errors import ConfigError

PATIENCE = 600.0  # seconds for one answer


@dataclass(frozen=True)
class Replayed:
    """One trace, in one way. Seconds are sums; `hit_rate` is the share of prompt tokens that were not computed.
    `nbytes` is what the store held at the end; None: not known."""

    trace: str
    way: str
    requests: int
    prompt_tokens: int
    computed: int
    first_s: float
    hit_rate: float
    nbytes: int | None


class Way(Protocol):
    """A way to answer requests."""

    name: str

    def answer(self, tokens: list[int], new: int) -> tuple[float, list[int]]:
        """(seconds, prompt and answer) of a greedy answer of so many tokens."""

    @property
    def reused(self) -> int:
        """Prompt tokens that were not computed so far."""

    @property
    def nbytes(self) -> int | None:
        """Bytes that are held for later requests."""


class Generate:
    """`generate` of an attached model, with a reuse store or without."""

    def __init__(self, name: str, model: PreTrainedModel, store: octavo.ReuseStore | None) -> None:
        self.name, self.model, self.store = name, model, store

    def answer(self, tokens: list[int], new: int) -> tuple[float, list[int]]:
        """See `Way`."""
        with_store(self.model, self.store)
        seconds, out = timed(self.model, tokens, new)
        return seconds, out[0].tolist()

    @property
    def reused(self) -> int:
        """See `Way`."""
        if self.store is None:
            return 0
        stats = self.store.stats()
        return stats.reused + stats.similar_tokens

    @property
    def nbytes(self) -> int | None:
        """See `Way`."""
        return None if self.store is None else self.store.stats().memory_nbytes


class Batched:
    """Transformers' continuous batching of an unattached model, which shares whole blocks of equal prefixes.

    A request that ends with its first token leaves no block that others share, so it is asked for two; its answer comes
    when it is done, so the second one's seconds count as well.
    """

    name = "generate_batch"
    nbytes = None

    def __init__(self, model: PreTrainedModel, manager: Any) -> None:
        self._manager, self._count, self._embedded, self._asked = manager, 0, 0, 0
        embeddings: Any = model.get_input_embeddings()
        self._hook = embeddings.register_forward_hook(self._embed)

    def _embed(self, module: object, args: tuple[Any, ...], out: object) -> None:
        self._embedded += args[0].numel()

    def answer(self, tokens: list[int], new: int) -> tuple[float, list[int]]:
        """See `Way`. Raises ConfigError where it stops, or never ends; transformers has logged why then."""
        self._count, new = self._count + 1, max(2, new)
        began = time.perf_counter()
        self._manager.add_request(tokens, request_id=str(self._count), max_new_tokens=new)
        while time.perf_counter() - began < PATIENCE and self._manager.is_running():
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                self._asked += len(tokens) + new - 1  # the last token is not read any more
                return time.perf_counter() - began, [*tokens, *result.generated_tokens]
        raise ConfigError("generate_batch has stopped before its request was done; leave it out with --no-peer")

    @property
    def reused(self) -> int:
        """See `Way`; padding of its batches, if any, counts as computed."""
        return self._asked - self._embedded

    def close(self) -> None:
        """End the count."""
        self._hook.remove()


@contextmanager
def batched(model: PreTrainedModel, tokens: int) -> Iterator[Batched]:
    """Transformers' continuous batching with room for so many tokens."""
    ends = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=ANSWER
    )
    page = 32
    config = ContinuousBatchingConfig(page_size=page, num_blocks=-(-tokens // page), max_batch_tokens=512)
    with torch.no_grad():
        starting: Any = model
        manager = starting.init_continuous_batching(generation_config=ends, continuous_batching_config=config)
        manager.start()
        way = Batched(model, manager)
        try:
            yield way
        finally:
            way.close()
            manager.stop(block=True)


def replay(trace: Trace, way: Way) -> Replayed:
    """Run a trace; seconds are until each first token, the rest of an answer is computed but not counted."""
    before: list[int] = []
    prompt, seconds, computed = 0, 0.0, 0
    for ask in trace.asks:
        tokens = [*before, *ask.tokens] if ask.goes_on else ask.tokens
        reused = way.reused
        took, _ = way.answer(tokens, 1)
        reused = way.reused - reused
        prompt, seconds, computed = prompt + len(tokens), seconds + took, computed + len(tokens) - reused
        if trace.asks[1:2] and trace.asks[1].goes_on:
            before = way.answer(tokens, ANSWER)[1]
    hit_rate = 1 - computed / prompt
    return Replayed(trace.name, way.name, len(trace.asks), prompt, computed, seconds, hit_rate, way.nbytes)
