"""Drafts: `generate` of an attached model that is asked for some gets caches that can take rejected tokens back.

With an assistant, prompt lookup or an early exit `generate` reads several tokens ahead, and crops the cache to those
that hold. With eviction that needs tokens that have expired meanwhile. They take memory, so caches keep them only where
drafts are asked for (for `octavo.config.UNDO` tokens or a draft), or as `octavo.attach(..., undo=N)` says. A draft is
cut to what its cache can take back: transformers' schedules lengthen drafts while they hold, and know no bound.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from octavo.attachment.cache import KVCache
from octavo.attachment.standin import BoundCache, bind
from octavo.config import UNDO
from octavo.errors import CacheStateError, NotAttachedError, UnsupportedModelError

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

_ASKED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")


def drafts(attachment: "Attachment", named: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` with these arguments drafts, or makes drafts for another model."""
    return _assists(named) or any(_asked(attachment, named, name) for name in _ASKED)


def _assists(named: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` makes drafts for another model."""
    return bool(getattr(named.get("generation_config"), "is_assistant", False))


def _asked(attachment: "Attachment", named: Mapping[str, Any], name: str) -> list[Any]:
    """All that a call of `generate` says by this name, in its arguments or in a configuration."""
    configured = named.get("generation_config"), attachment.model, named.get("assistant_model")
    each = [named.get(name), *(getattr(getattr(c, "generation_config", c), name, None) for c in configured)]
    return [asked for asked in each if asked]


def prepared(attachment: "Attachment", named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `generate` that drafts, with a cache that can take drafts back.

    Raises CacheStateError where none can.
    """
    if named.get("use_cache") is False or named.get("cache_implementation"):
        return named  # generate says that it needs another cache
    ids = named.get("input_ids")
    if _assists(named) and named.get("attention_mask") is None and isinstance(ids, Tensor):
        # It comes without a mask where nothing is padded; transformers would hide padding tokens that were generated,
        # which are cached by then.
        named = {**named, "attention_mask": torch.ones_like(ids)}
    past = named.get("past_key_values")
    if past is None:
        named = {**named, "past_key_values": KVCache(attachment.model)}
    elif type(past) is DynamicCache and not past.get_seq_length():
        bind(past, KVCache(attachment.model))
    cache = _paged(named["past_key_values"])
    if cache is not None:
        _refuse_filled(attachment, named, cache)
        if cache.states is not None:
            raise CacheStateError(
                f"{type(attachment.model).__name__} has layers with a state, which cannot take drafts back; leave "
                "drafts out, or detach the model"
            )
        longest = (_asked(attachment, named, name) for name in ("prompt_lookup_num_tokens", "num_assistant_tokens"))
        cache.activate_past_recording(max([UNDO, *(int(n) for each in longest for n in each)]))
        if _reach(cache) == 0:
            raise CacheStateError("a model attached with undo=0 can take no draft back; octavo.attach(model, undo=N)")
    return named


def _paged(past: object) -> KVCache | None:
    """The KVCache that is meant by `past_key_values`, None: no such cache."""
    past = past.octavo_cache if isinstance(past, BoundCache) else past
    return past if isinstance(past, KVCache) else None


def _reach(cache: KVCache) -> int | None:
    """How many tokens a cache can surely take back; None: any."""
    return None if cache.is_croppable else cache.undo


def run_candidates(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What makes drafts in an attached model's `generate`, which asks for it where its cache is ready.

    Drafts are as long as the cache can take back. An attached assistant's cache does not exist yet; it will reach back
    as its model's settings say, or as far as its drafts are long at first (`prepared`).
    """
    made = original(*args, **kwargs)
    named = inspect.signature(original).bind(*args, **kwargs).arguments
    cache = _paged((named.get("model_kwargs") or {}).get("past_key_values"))
    reaches = [] if cache is None else [_reach(cache)]
    assistant: Any = getattr(made, "assistant_model", None)
    if assistant is not None:
        with suppress(NotAttachedError, UnsupportedModelError):
            empty = KVCache(assistant)
            empty.activate_past_recording(max(UNDO, made.num_assistant_tokens))
            reaches.append(_reach(empty))
    known = [reach for reach in reaches if reach is not None]
    if known:
        made.get_candidates = functools.partial(_cut, made, made.get_candidates, min(known))
    return made


def _cut(
    made: Any, original: Callable[..., Any], most: int, input_ids: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """At most so many candidates, as ids [1, N + n] behind the text's and logits [1, n, vocabulary]."""
    if hasattr(made, "num_assistant_tokens"):  # which a schedule raises after drafts that hold
        made.num_assistant_tokens = min(made.num_assistant_tokens, most)
    ids, logits = original(input_ids, **kwargs)
    return ids[:, : input_ids.shape[1] + most], None if logits is None else logits[:, :most]


def _refuse_filled(attachment: "Attachment", named: Mapping[str, Any], cache: KVCache) -> None:
    """Raise CacheStateError where `generate` would read a prompt into a cache that has read its beginning already."""
    model: Any = attachment.model
    rereads = "next_sequence_length" in inspect.signature(model.prepare_inputs_for_generation).parameters
    if cache.seen and rereads and not _assists(named):
        raise CacheStateError(
            f"this version of transformers reads the whole prompt where it drafts, and the cache holds {cache.seen} "
            "columns of it; leave past_key_values out, or ask for no drafts"
        )


def run_drafts(attachment: "Attachment", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What an attached model's `generate` is; `original` is its own."""
    named = {**dict(zip(inspect.signature(original).parameters, args, strict=False)), **kwargs}
    if not drafts(attachment, named):
        return original(*args, **kwargs)
    config: Any = attachment.model.config
    layers = config.num_hidden_layers
    named = prepared(attachment, named)
    cache = _paged(named.get("past_key_values"))
    before = cache is not None and cache.drafts  # who drafts by an early exit has the cache of whom it drafts for
    try:
        if cache is not None:
            cache.drafts = True
        return original(**named)
    finally:
        if cache is not None:
            cache.drafts = before
        if config.num_hidden_layers != layers:  # an early exit that fails leaves the layers that draft alone
            config.num_hidden_layers = layers
