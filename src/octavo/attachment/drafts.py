"""Drafts: `generate` of an attached model that is asked for some gets caches that can take rejected tokens back.

With an assistant, prompt lookup or an early exit `generate` reads several tokens ahead, and crops the cache to those
that hold. With eviction that needs tokens that have expired meanwhile. They take memory, so caches keep them only where
drafts are asked for (for `octavo.config.UNDO` tokens or a draft), or as `octavo.attach(..., undo=N)` says.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from octavo.attachment.cache import KVCache
from octavo.attachment.standin import BoundCache, bind
from octavo.config import UNDO
from octavo.errors import CacheStateError

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

_ASKED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")


def drafts(attachment: "Attachment", named: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` with these arguments drafts, or makes drafts for another model."""
    return _assists(named) or any(_asked(attachment, named, name) for name in _ASKED)


def _assists(named: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` makes drafts for another model."""
    return bool(getattr(named.get("generation_config"), "is_assistant", False))


def _asked(attachment: "Attachment", named: Mapping[str, Any], name: str) -> Any:
    """What a call of `generate` asks for by this name, in its arguments or in a configuration; None: nothing."""
    configured = named.get("generation_config"), attachment.model, named.get("assistant_model")
    each = [named.get(name), *(getattr(getattr(c, "generation_config", c), name, None) for c in configured)]
    return next((asked for asked in each if asked), None)


def prepared(attachment: "Attachment", named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `generate` that drafts, with a cache that can take drafts back."""
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
    cache = named["past_key_values"]
    cache = cache.octavo_cache if isinstance(cache, BoundCache) else cache
    if isinstance(cache, KVCache):
        _refuse_filled(attachment, named, cache)
        longest = (_asked(attachment, named, name) for name in ("prompt_lookup_num_tokens", "num_assistant_tokens"))
        cache.activate_past_recording(max([UNDO, *(int(n) for n in longest if n)]))
    return named


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
    try:
        return original(**prepared(attachment, named))
    finally:  # an early exit that fails leaves the model with the layers that draft alone
        if config.num_hidden_layers != layers:
            config.num_hidden_layers = layers
