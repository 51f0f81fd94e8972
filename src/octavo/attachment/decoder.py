"""The forward of an attached model's decoder: which cache it goes to, chunk after chunk, or none."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from octavo.attachment.cache import KVCache
from octavo.attachment.chunks import chunk_bounds, join, padding, part_of
from octavo.attachment.forward import NAME, Forward
from octavo.errors import CacheStateError, PromptError, UnsupportedModelError

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

_STANDS_IN = "octavo_cache"  # under this name a DynamicCache keeps the KVCache that stands in for it
_ANSWERS = (  # such a DynamicCache answers these as its KVCache does; a deep copy of it copies both
    "batch_repeat_interleave",
    "batch_select_indices",
    "crop",
    "get_mask_sizes",
    "get_seq_length",
    "reorder_cache",
    "reset",
    "update",
)


def run_decoder(attachment: "Attachment", names: list[str], *args: Any, **kwargs: Any) -> Any:
    """What an attached decoder's `forward` is; `names` are those of its own parameters.

    Raises PromptError for an empty or too long input, UnsupportedModelError for what Octavo does not compute,
    CacheStateError for a cache that cannot go on with this input, and CacheBudgetError; a cache is then as it was.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    asked, mode = kwargs.pop("octavo_keep", None), kwargs.pop("swiftkv", None)
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return attachment.original(**kwargs)  # transformers says what is missing
    columns = tokens.shape[1]
    if columns == 0:
        raise PromptError("the prompt is empty; give at least one token")
    _refuse(attachment, kwargs)
    model: Any = attachment.model
    past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if model.training and getattr(model.base_model.layers[0], "gradient_checkpointing", False) and not _held(past):
        past, use_cache = None, False  # layers that run again must not fill a cache again
        kwargs.update(past_key_values=past, use_cache=use_cache)
    cached = past is not None or (model.config.use_cache if use_cache is None else use_cache)
    cache = _cache(attachment, past, mode) if cached else None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        raise UnsupportedModelError("masks made beforehand are not supported; pass a 2-D padding mask")
    valid = padding(mask, columns)
    if cache is None:
        policy, transform = attachment.running() if mode is None else attachment.oracle(mode)
        forward = Forward(attachment.attention, policy=policy, valid=valid, transform=transform)
        return attachment.original(**kwargs, octavo_forward=forward)
    _check_length(model, cache, columns)
    if cache.seen and mask is not None and mask.ndim == 2 and mask.shape[1] == cache.seen + columns:
        cache.check_mask(mask)
    kwargs.update(past_key_values=cache, use_cache=True)
    return _chunks(attachment, cache, kwargs, tokens, valid, asked)


def _chunks(
    attachment: "Attachment",
    cache: KVCache,
    kwargs: dict[str, Any],
    tokens: Tensor,
    valid: Tensor | None,
    asked: int | None,
) -> Any:
    """All of the input through the decoder; `asked`: how many of the last tokens' logits are wanted."""
    batch, columns = tokens.shape[:2]
    # Pages are constants to autograd: where gradients are wanted, all of the input is one chunk.
    trains = torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in attachment.model.parameters())
    )
    whole = trains or attachment.needs_whole or kwargs.get("deepstack_visual_embeds") is not None
    chunk = cache.seen + columns if whole else attachment.settings.chunk
    wanted = columns if asked is None or trains or not cache.swiftkv_on else asked
    parts, before, kept = [], cache.seen, cache.sequences.boundaries.wanted
    inside = [p for p in kept if before < p < before + columns]
    if whole and inside:
        raise CacheStateError(
            f"boundary {min(inside)} lies within an input that must run in one piece, since gradients are wanted or "
            "RoPE depends on its length; call the model under torch.no_grad(), or end the input there"
        )
    try:
        for first, last, keep in chunk_bounds(before, columns, chunk, wanted, kept):
            part = kwargs if last - first == columns else part_of(kwargs, first, last)
            real = None if valid is None else valid[:, first:last]
            parts.append(_step(attachment, cache, part, (batch, last - first), real, keep, trains))
    except BaseException:
        with suppress(CacheStateError):  # where that needs evicted tokens, the chunks that went well stay
            cache.crop(before - cache.seen)
        raise
    return join(parts)


def _step(
    attachment: "Attachment",
    cache: KVCache,
    kwargs: dict[str, Any],
    size: tuple[int, int],
    valid: Tensor | None,
    keep: int,
    trains: bool,
) -> Any:
    """One chunk through the decoder; the cache changes only when all of it went well."""
    gates = attachment.modes.folded(cache.swiftkv_on)
    transform = attachment.modes.transform() if cache.swiftkv_on else None
    cache.check_batch(size[0])
    try:
        cache.begin(*size, valid, trains)
        forward = Forward(attachment.attention, cache, gates, keep=keep, transform=transform)
        out = attachment.original(**kwargs, octavo_forward=forward)
        forward.commit()
    except BaseException:
        cache.abandon()
        raise
    return out


def _cache(attachment: "Attachment", past: object, mode: bool | None) -> KVCache:
    """The KVCache to use for what was given as `past_key_values`."""
    if type(past) is DynamicCache:
        past = past.__dict__.get(_STANDS_IN) or (past if _held(past) else _stand_in(attachment, past, mode))
    if past is None:
        return KVCache(attachment.model, swiftkv=mode)
    if not isinstance(past, KVCache):
        raise CacheStateError(
            f"an attached model keeps its keys in octavo.KVCache, not in {type(past).__name__}; "
            "pass octavo.KVCache(model) as past_key_values, or neither that nor cache_implementation"
        )
    if past.owner != attachment.key:
        raise CacheStateError("this KVCache was made for another model or before the model was attached anew")
    past.take_mode(attachment, mode)
    return past


def _stand_in(attachment: "Attachment", past: Any, mode: bool | None) -> KVCache:
    """A KVCache for an empty DynamicCache, which from now on answers as the KVCache does.

    So the idiom that hands one DynamicCache to `generate` turn after turn goes on where it stopped. A model that is
    not attached gets NotAttachedError from its `update`: it would find none of the tokens that the cache counts.
    """
    cache = KVCache(attachment.model, swiftkv=mode)
    past.__dict__[_STANDS_IN] = cache
    for name in _ANSWERS:
        past.__dict__[name] = getattr(cache, name)
    return cache


def _held(past: Any) -> bool:
    """Whether a cache, or none, holds tokens."""
    return past is not None and (not hasattr(past, "get_seq_length") or past.get_seq_length() > 0)


def _check_length(model: nn.Module, cache: KVCache, columns: int) -> None:
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if columns > 1 and limit is not None and cache.seen + columns > limit:
        raise PromptError(
            f"the prompt has {cache.seen + columns:,} tokens, the model has {limit:,} positions; shorten it"
        )


def _refuse(attachment: "Attachment", kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for what would silently be ignored."""
    config: Any = attachment.model.base_model.config
    if config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"this model's attention was set to {config._attn_implementation!r} after octavo.attach; attach it anew, "
            "or octavo.detach it first"
        )
    wanted = kwargs.get("output_attentions")
    if getattr(config, "output_attentions", False) if wanted is None else wanted:
        raise UnsupportedModelError("attention weights are not computed by Octavo; call octavo.detach(model) for them")
