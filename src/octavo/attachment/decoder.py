"""The forward of an attached model's decoder: which cache it goes to, chunk after chunk, or none."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from octavo.attachment import positions
from octavo.attachment.cache import KVCache
from octavo.attachment.chunks import chunk_bounds, join, part_of
from octavo.attachment.forward import NAME, Forward, asked_for
from octavo.attachment.masks import padding_of
from octavo.attachment.standin import BoundCache, bind, release
from octavo.errors import CacheError, CacheStateError, PromptError, UnsupportedModelError

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment


def run_decoder(attachment: "Attachment", names: list[str], *args: Any, **kwargs: Any) -> Any:
    """What an attached decoder's `forward` is; `names` are those of its own parameters.

    Without `position_ids` tokens stand where they are among the tokens of their sequence: where there is padding,
    transformers would count it. Raises PromptError for an empty or too long input or a mask of another shape,
    UnsupportedModelError for what Octavo does not compute, CacheStateError for a cache that cannot go on with this
    input, and CacheBudgetError; a cache is then as it was.
    """
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if torch.compiler.is_compiling() and not _traceable(attachment, kwargs):
        return _run_untraced(attachment, kwargs)
    return _run(attachment, kwargs)


def _traceable(attachment: "Attachment", kwargs: dict[str, Any]) -> bool:
    """Whether `torch.compile` and `torch.export` can trace a forward: one without a cache, told by its arguments.

    Raises UnsupportedModelError where it is exported and cannot be.
    """
    model: Any = attachment.model
    stores = kwargs.get("past_key_values") is not None or asked_for("use_cache", kwargs, model.config, default=True)
    trains = model.training and kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None
    traceable = bool(attachment.layout.keywords and (trains or not stores))
    if not torch.compiler.is_exporting():
        return traceable
    name, adapters = type(model).__name__, attachment.policy is not None or attachment.transform is not None
    if not attachment.layout.keywords:
        raise UnsupportedModelError(f"{name} cannot be exported: its layers drop what Octavo tells them; detach it")
    if not traceable:
        raise UnsupportedModelError(f"{name} cannot be exported with a cache: {_UNTRACED}; pass use_cache=False")
    if adapters and torch.compiler.is_dynamo_compiling():
        raise UnsupportedModelError(
            f"{name} cannot be exported with strict=True, which takes weights from the model alone, and its adapters "
            "lie beside it; pass strict=False"
        )
    return True


_UNTRACED = "Octavo takes and frees pages on the host, in steps that a traced graph would not repeat"


@torch.compiler.disable(reason=_UNTRACED)  # type: ignore[untyped-decorator, no-untyped-call]
def _run_untraced(attachment: "Attachment", kwargs: dict[str, Any]) -> Any:
    """The same as it is, inside a model that is compiled."""
    return _run(attachment, kwargs)


def _run(attachment: "Attachment", kwargs: dict[str, Any]) -> Any:
    """A forward of the decoder with these arguments; see `run_decoder`."""
    asked, mode = kwargs.pop("octavo_keep", None), kwargs.pop("swiftkv", None)
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return attachment.original(**kwargs)  # transformers says what is missing
    if tokens.shape[1] == 0:
        raise PromptError("the prompt is empty; give at least one token")
    pictures: dict[str, Tensor] = {}
    if isinstance(kwargs.get("attention_mask"), dict):
        kwargs["attention_mask"], pictures = padding_of(kwargs["attention_mask"])
    if isinstance(kwargs.get("logits_to_keep"), int):
        kwargs["logits_to_keep"] = 0  # decoders that drop other tokens' last layers cannot join chunks
    _refuse(attachment, kwargs)
    model: Any = attachment.model
    past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if model.training and past is None and use_cache is None:  # a step of training reads no cache
        kwargs["use_cache"] = use_cache = False
    if model.training and _checkpoints(model) and not _held(past):
        if not attachment.layout.keywords:
            raise UnsupportedModelError(f"gradient checkpointing is not supported for {type(model).__name__}")
        past, use_cache = None, False  # layers that run again must not fill a cache again
        kwargs.update(past_key_values=past, use_cache=use_cache)
    if past is None and not asked_for("use_cache", kwargs, model.config, default=True):
        return _uncached(attachment, kwargs, tokens, mode, pictures)
    try:
        cache = _cache(attachment, past, mode)
        return _cached(attachment, cache, kwargs, tokens, asked, pictures)
    except BaseException:
        release(past)  # if nothing came into it, it may go to another model
        raise


def _checkpoints(model: Any) -> bool:
    """Whether layers run again for their gradients."""
    now = hasattr(type(model), "is_activation_checkpointing")  # the older name warns
    return bool(model.is_activation_checkpointing if now else model.is_gradient_checkpointing)


def _uncached(
    attachment: "Attachment", kwargs: dict[str, Any], tokens: Tensor, mode: bool | None, pictures: dict[str, Tensor]
) -> Any:
    """A forward without a cache, under the policy that the attachment has."""
    batch, columns = tokens.shape[:2]
    positions.check_shapes(kwargs, batch, 0, columns)
    valid = positions.padding(kwargs.get("attention_mask"), columns)
    if valid is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = positions.of_tokens(valid)
    policy, transform = attachment.running() if mode is None else attachment.oracle(mode)
    forward = Forward(
        attachment.layout,
        policy=policy,
        valid=valid,
        packed=positions.packed(kwargs, batch),
        pictures=_by_layer(attachment, pictures, columns),
        transform=transform,
        borrowed=attachment.borrowed,
    )
    return attachment.run(forward, **kwargs)


def _by_layer(attachment: "Attachment", pictures: dict[str, Tensor], columns: int) -> tuple[Tensor | None, ...]:
    """For each KV layer which picture the tokens belong to, [B, columns]; None: they see no later token there."""
    if not pictures:
        return ()
    kinds = attachment.model.config.layer_types
    each = (pictures.get(kinds[layer]) for layer in attachment.layout.stores)
    return tuple(None if numbers is None else numbers[:, :columns] for numbers in each)


def _cached(
    attachment: "Attachment",
    cache: KVCache,
    kwargs: dict[str, Any],
    tokens: Tensor,
    asked: int | None,
    pictures: dict[str, Tensor],
) -> Any:
    """A forward that a cache takes part in; `asked`: how many of the last tokens' logits are wanted."""
    batch, columns = tokens.shape[:2]
    cache.check_batch(batch)
    cache.check_joined()
    positions.check_shapes(kwargs, batch, cache.seen, columns)
    mask = kwargs.get("attention_mask")
    valid = positions.padding(mask, columns)
    positions.check_length(attachment.reach.most, cache, columns, valid)
    if cache.seen and mask is not None and mask.ndim == 2 and mask.shape[1] > columns:
        cache.check_mask(mask)
    kwargs.update(past_key_values=cache, use_cache=True)
    if mask is not None and mask.ndim == 2 and cache.states is None:
        kwargs["attention_mask"] = None  # padding travels with the forward, and nothing else reads the mask
    if cache.seen:
        if any(bool((numbers[:, cache.seen : cache.seen + columns] >= 0).any()) for numbers in pictures.values()):
            raise UnsupportedModelError(
                f"{type(attachment.model).__name__}'s tokens of a picture see each other in both directions, which is "
                "computed at the beginning of a text alone; give all turns up to the picture to an empty cache"
            )
        pictures = {}
    return _chunks(attachment, cache, kwargs, tokens, valid, asked, _by_layer(attachment, pictures, columns))


def _chunks(
    attachment: "Attachment",
    cache: KVCache,
    kwargs: dict[str, Any],
    tokens: Tensor,
    valid: Tensor | None,
    asked: int | None,
    pictures: tuple[Tensor | None, ...],
) -> Any:
    """All of the input through the decoder; `asked`: how many of the last tokens' logits are wanted."""
    batch, columns = tokens.shape[:2]
    # Pages are constants to autograd: where gradients are wanted, all of the input is one chunk.
    trains = torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in attachment.model.parameters())
    )
    whole = trains or attachment.needs_whole or kwargs.get("deepstack_visual_embeds") is not None or bool(pictures)
    chunk = cache.seen + columns if whole else attachment.settings.chunk
    wanted = columns if asked is None or trains or not cache.swiftkv_on else asked
    if not (attachment.layout.continues or cache.states is None):  # the first input in one piece, then one by one
        chunk, whole = (1, False) if cache.seen else (columns, columns > 1)
    parts, before, kept, moved = [], cache.seen, cache.sequences.boundaries.wanted, cache.moved
    inside = [p for p in kept if before < p < before + columns]
    if whole and inside:
        raise CacheStateError(
            f"boundary {min(inside)} lies within an input that must run in one piece, since gradients are wanted or "
            "RoPE, pictures or states depend on it; call the model under torch.no_grad(), or end the input there"
        )
    if cache.sequences.passes_boundaries(valid):
        kept = set()
    try:
        for first, last, keep in chunk_bounds(before, columns, chunk, wanted, kept):
            part = kwargs if last - first == columns else part_of(kwargs, first, last, cache.states is not None)
            real = None if valid is None else valid[:, first:last]
            parts.append(_step(attachment, cache, part, (batch, last - first), real, keep, trains, pictures))
    except BaseException:
        with suppress(CacheError):  # where that needs evicted tokens or more memory, the chunks that went well stay
            cache.crop(before - cache.seen)
            cache.moved = moved
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
    pictures: tuple[Tensor | None, ...],
) -> Any:
    """One chunk through the decoder; the cache changes only when all of it went well."""
    replayed = None if pictures else _replayed(attachment, cache, kwargs, size[1], valid, keep, trains)
    if replayed is not None:
        return replayed
    given = kwargs.get("position_ids")
    try:
        cache.begin(*size, valid, trains)
        moved = cache.moved if given is None else cache.moved_by(given)
        if given is None and (counted := positions.next_in(cache, valid)) is not None:
            kwargs = {**kwargs, "position_ids": counted}
        forward = attachment.forward_on(
            cache,
            keep,
            policy=attachment.oracle(cache.swiftkv_on)[0] if pictures else None,
            valid=valid if pictures else None,
            pictures=pictures,
        )
        with attachment.pieces(size[1], trains):
            out = attachment.run(forward, **kwargs)
        forward.commit()
        cache.moved = moved
    except BaseException:
        cache.abandon()
        raise
    return out


def _replayed(
    attachment: "Attachment",
    cache: KVCache,
    kwargs: dict[str, Any],
    columns: int,
    valid: Tensor | None,
    keep: int,
    trains: bool,
) -> Any | None:
    """The same from a CUDA graph; None where it is to run as usual."""
    graphs, prompts = attachment.graphs, attachment.prompts
    if graphs is not None and graphs.suits(cache, kwargs, columns, trains):
        return graphs.run(cache, kwargs, valid)
    if prompts is not None and prompts.suits(cache, kwargs, columns, valid, keep, trains):
        return prompts.run(cache, kwargs, columns, valid, keep)
    return None


def _cache(attachment: "Attachment", past: object, mode: bool | None) -> KVCache:
    """The KVCache to use for what was given as `past_key_values`."""
    if type(past) is BoundCache and past.octavo_cache.owner != attachment.key:
        release(past)
    if type(past) is DynamicCache and not _held(past):
        bind(past, KVCache(attachment.model, swiftkv=mode))
    if type(past) is BoundCache:
        past = past.octavo_cache
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


def _held(past: Any) -> bool:
    """Whether a cache, or none, holds tokens."""
    return past is not None and (not hasattr(past, "get_seq_length") or past.get_seq_length() > 0)


def _refuse(attachment: "Attachment", kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for what would silently be ignored."""
    config: Any = attachment.model.config
    if config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"this model's attention was set to {config._attn_implementation!r} after octavo.attach; attach it anew, "
            "or octavo.detach it first"
        )
    if asked_for("output_attentions", kwargs, config):
        raise UnsupportedModelError("attention weights are not computed by Octavo; call octavo.detach(model) for them")
