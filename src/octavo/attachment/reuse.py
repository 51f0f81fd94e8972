"""`generate` of an attached model that has a reuse store: what was read before is not read again.

One prompt: what the store knows is restored, transformers computes the rest, and once the first new token is there the
prompt is stored; at the end so is the answer, for the next turn of a chat. Several prompts that hit, or that begin
alike, are read one after the other up to their last tokens and then joined, so that what they share is computed once.
What `octavo.attachment.calls` does not understand runs as if there were no store, and so does everything when the store
fails.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from octavo.attachment.answers import known, warn
from octavo.attachment.cache import KVCache
from octavo.attachment.calls import Call, understood
from octavo.attachment.similar import begin_similar
from octavo.errors import CacheBudgetError
from octavo.kv import PagedCache

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment


class Reading(Protocol):
    """One prompt on its way through a store; see `octavo.reuse.Reading`."""

    @property
    def boundary(self) -> int:
        """Tokens that came from the store."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the model was when it was opened."""

    def insert(self, cache: PagedCache, which: int = 0, tokens: Any = None) -> bool:
        """Store what a sequence of a cache has read."""

    def close(self) -> None:
        """End it."""


class Reuse(Protocol):
    """What `attach` takes as `reuse`; see `octavo.ReuseStore`."""

    @property
    def shortest(self) -> int:
        """Prompts of fewer tokens are not looked up."""

    def peek(self, cache: PagedCache, identity: Mapping[str, Any], tokens: Any) -> int:
        """How many tokens `open` would restore."""

    def open(
        self,
        cache: PagedCache,
        identity: Mapping[str, Any],
        tokens: Any,
        *,
        padding: int = 0,
        restore: bool = True,
        wait: bool = True,
        learned: Sequence[int] = (),
        ends: Sequence[int] = (),
    ) -> Reading:
        """Restore what is known of a prompt into an empty cache."""


def begin(store: Reuse, cache: KVCache, tokens: Sequence[int], **options: Any) -> Reading | None:
    """`open` a prompt for an empty cache; None where pages have no room or, with a warning, where the store fails."""
    if torch.is_autocast_enabled(cache.shape.device.type):
        return None  # keys are rounded as nothing in an identity tells
    try:
        if options.get("restore", True) and (similar := begin_similar(store, cache, tokens)) is not None:
            return similar  # type: ignore[no-any-return]
    except CacheBudgetError:
        pass
    except Exception as e:
        warn("could not use similar prompts", e)
    try:
        return store.open(cache, cache.identity(), tokens, ends=turn_ends(cache.attachment.model, tokens), **options)
    except CacheBudgetError:
        return None
    except Exception as e:  # an answer must not depend on the store
        warn("failed and is not used", e)
        cache.reset()
        return None


def turn_ends(model: PreTrainedModel, tokens: Sequence[int]) -> list[int]:
    """How many of a prompt's tokens there are up to each that ends a turn of a chat, as it ends an answer."""
    config: Any = model.generation_config
    named = getattr(config, "eos_token_id", None)
    stops = {named} if isinstance(named, int) else set(named or ())
    return [i for i, token in enumerate(map(int, tokens), 1) if token in stops and i < len(tokens)]


def store_in(reading: Reading, cache: KVCache, which: int = 0, tokens: Any = None) -> None:
    """Store what a sequence has read, unless it is approximate; a store that fails costs a warning."""
    if cache.approximate:
        return
    try:
        reading.insert(cache, which, tokens)
    except Exception as e:
        warn("could not store", e)


def run_generate(attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What an attached model's `generate` is; `original` is its own."""
    store = attachment.reuse
    call = None if store is None else understood(attachment, original, args, kwargs)
    if store is None or call is None:
        return original(*args, **kwargs)
    if len(call.rows) == 1 and call.copies == 1:
        answer = known(attachment, call)
        if answer is not None and (found := answer.find()) is not None:
            return torch.cat([call.ids, call.ids.new_tensor([found])], 1)
        cache = KVCache(attachment.model)
        memory, out = cache.memory, _one(cache, store, call, original)
        if answer is not None and isinstance(out, Tensor) and not cache.approximate:
            answer.keep(out[0, call.columns :].tolist())
        del cache
        memory.reclaim()  # pages that nobody has any more are zeroed now, not before the next answer's first token
        return out
    if not _share(attachment.model, store, call):
        return _batch(store, KVCache(attachment.model), call, original)
    joined = _joined(attachment.model, store, call)
    given = call.given if joined is None else {**call.given, "past_key_values": joined}
    return original(**given)


def _share(model: PreTrainedModel, store: Reuse, call: Call) -> bool:
    """Whether some prompts have something in common, with each other, with copies of themselves or with the store."""
    if call.copies > 1 or any(_common(a, b) >= store.shortest for a, b in pairwise(sorted(call.rows))):
        return True
    cache = KVCache(model)
    identity = cache.identity()
    try:
        return any(store.peek(cache, identity, row) for row in call.rows)
    except Exception as e:
        warn("failed and is not used", e)
        return False


def _one(cache: KVCache, store: Reuse, call: Call, original: Callable[..., Any]) -> Any:
    """One prompt, one answer."""
    reading = begin(store, cache, call.rows[0])
    if reading is None:
        return original(**call.given)
    try:
        prompt = _Prompt([reading], cache)
        out = original(**_with(call, cache, prompt))
        prompt.store()
        answer = out if isinstance(out, Tensor) else out.sequences
        store_in(reading, cache, 0, answer[0, : int(cache.position[0])])
        return out
    except BaseException:
        if cache.rows and int(cache.position[0]) > reading.boundary:
            prompt.store()
        raise
    finally:
        reading.close()


def _batch(store: Reuse, cache: KVCache, call: Call, original: Callable[..., Any]) -> Any:
    """Prompts that have nothing in common, with each other or with what is stored: they are read as one batch."""
    with ExitStack() as stack:
        readings = []
        for row in call.rows:
            reading = begin(store, cache, row, padding=call.columns - len(row), restore=False, wait=False)
            if reading is None:
                return original(**call.given)
            stack.callback(reading.close)
            readings.append(reading)
        return original(**_with(call, cache, _Prompt(readings, cache)))


def _joined(model: PreTrainedModel, store: Reuse, call: Call) -> KVCache | None:
    """A cache that has read all prompts but their last tokens; None where pages or the store have no room for that."""
    whole = KVCache(model)
    try:
        for i, row in enumerate(call.rows):
            cache = KVCache(model)
            parts = [_common(row, later) for later in call.rows[i + 1 :]]
            reading = begin(store, cache, row, wait=False, learned=parts)
            if reading is None:
                return None
            try:
                _fill(model, row, reading.boundary, cache, call.ids.device)
                store_in(reading, cache)
            finally:
                reading.close()
            whole.join(cache)
        whole.batch_repeat_interleave(call.copies)
    except CacheBudgetError:
        whole.reset()
        return None
    return whole


@torch.no_grad()
def _fill(model: PreTrainedModel, row: list[int], first: int, cache: KVCache, device: torch.device) -> None:
    if first < len(row) - 1:
        part = torch.tensor([row[first:-1]], device=device)
        model.base_model(input_ids=part, past_key_values=cache, use_cache=True, octavo_keep=0)


class _Prompt(StoppingCriteria):  # type: ignore[misc]
    """Stores prompts when `generate` asks for the first time whether to stop: they are read then. It never stops
    anything. Where tokens are streamed that comes before the first one is, so `_Streamed` does it instead."""

    def __init__(self, readings: Sequence[Reading], cache: KVCache) -> None:
        self.readings, self.cache, self.done, self.streamed = readings, cache, False, False

    def store(self) -> None:
        """Store all prompts, once."""
        if not self.done:
            self.done = True
            for which, reading in enumerate(self.readings):
                store_in(reading, self.cache, which)
                reading.close()  # while it generates, what it went on from may leave

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.streamed:
            self.store()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Streamed(BaseStreamer):  # type: ignore[misc]
    """A streamer that stores a prompt once its first token has been given on."""

    def __init__(self, streamer: Any, prompt: _Prompt) -> None:
        self.streamer, self.prompt, self.begun = streamer, prompt, False
        prompt.streamed = True

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.streamer.put(value)
        if self.begun:
            self.prompt.store()
        self.begun = True

    def end(self) -> None:
        """Called at the end."""
        self.streamer.end()


def _with(call: Call, cache: KVCache, prompt: _Prompt) -> dict[str, Any]:
    """What `generate` is given: what the user gave, the cache, and what stores the prompt."""
    given = {**call.given, "past_key_values": cache}
    given["stopping_criteria"] = [*(given.get("stopping_criteria") or []), prompt]
    if "streamer" in given:
        given["streamer"] = _Streamed(given["streamer"], prompt)
    return given


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two prompts begin with in common."""
    n = min(len(a), len(b))
    differs = [x != y for x, y in zip(a[:n], b[:n], strict=True)]
    return differs.index(True) if True in differs else n
