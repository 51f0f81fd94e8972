"""A Hugging Face model joined with gates, SwiftKV, pages and attention, at seams that transformers offers.

Three seams: the attention function (`AttentionInterface`), the cache (`Cache`), and the forward calls of the
decoder, its layers and its attention modules. Nothing of the model is copied and nothing is global: what runs
inside a forward (`octavo.attachment.forward`) gets all it needs with the call.
"""

import functools
import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from octavo.attachment.chunks import chunk_bounds, join, padding, part_of
from octavo.attachment.forward import NAME, Step, ask_for_logits, remember_hidden, run_attention, run_layer
from octavo.attachment.modes import Modes
from octavo.attachment.supported import attention_modules, rope_sees_length
from octavo.attention import Packed
from octavo.config import CacheSettings
from octavo.dms import Adapter, HardGates, Policy
from octavo.errors import CacheStateError, ConfigError, NotAttachedError, PromptError
from octavo.kv import PagedCache
from octavo.swiftkv import SwiftKV, SwiftKVAdapter
from octavo.swiftkv.initial import MODEL_TYPES


def attachment_of(model: PreTrainedModel) -> "Attachment | None":
    """What `attach` joined to this model, or None."""
    return model.__dict__.get("_octavo")


def require_attachment(model: PreTrainedModel) -> "Attachment":
    """What `attach` joined to this model; NotAttachedError where it joined nothing."""
    attachment = attachment_of(model)
    if attachment is None:
        raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
    return attachment


@torch.no_grad()
def fill(model: PreTrainedModel, ids: Tensor, cache: "KVCache") -> None:
    """Read tokens [B, N] int64 into a cache without asking for logits: with SwiftKV they skip the later layers."""
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, octavo_keep=0)


class KVCache(PagedCache):
    """A transformers `Cache` for an attached model; pass it to `generate` or to the model as `past_key_values`.

    `nbytes`: bytes held; `dense_nbytes`: bytes a dense cache would hold; `kept`: visible slots, int64
    [batch, stores, kv_heads]. `budget` (bytes) overrides the one given to `attach`. `swiftkv` True or False makes
    every forward on this cache run with or without SwiftKV; None: as `set_swiftkv` says when the cache is first
    used. A cache holds one mode's keys and refuses the other. A forward that fails leaves it as it was, but with the
    chunks that went well where taking them back would need evicted tokens.
    """

    def __init__(self, model: PreTrainedModel, *, budget: int | None = None, swiftkv: bool | None = None) -> None:
        attachment = require_attachment(model)
        settings = attachment.settings
        if budget is not None:
            settings = CacheSettings(settings.chunk, settings.page_size, budget)
        self.owner = attachment.key
        self.fixed = swiftkv
        self.swiftkv = attachment.checked_mode(swiftkv)
        super().__init__(attachment.modes.shape(self.swiftkv), attachment.modes.eviction(self.swiftkv), settings)


class Attachment:
    """One model's join: its adapters and settings, and what is needed to undo it.

    `policy` and `transform` are what forwards without a cache run under (None: dense; None: base model); see
    `using`.
    """

    policy: Policy | None
    transform: SwiftKV | None

    def __init__(
        self, model: PreTrainedModel, adapter: Adapter | None, swiftkv: SwiftKVAdapter | None, settings: CacheSettings
    ) -> None:
        self.model = model
        self.modes = Modes(model, adapter, swiftkv)
        self.settings = settings
        self.key = uuid.uuid4().hex  # what caches remember of it: survives deep copies, is never used again
        self._attention_before = model.config._attn_implementation
        self._attention = attention_modules(model)
        self._whole = rope_sees_length(model.config)
        base: Any = model.base_model
        self._forward: Callable[..., Any] = base.forward
        self._replaced: list[tuple[nn.Module, Any]] = []  # modules whose `forward` is ours, and what they had
        self._hooks = [m.register_forward_pre_hook(remember_hidden, with_kwargs=True) for m in self._attention]
        model.set_attn_implementation(NAME)
        names = list(inspect.signature(base.forward).parameters)
        # Partials of plain functions, not closures: a deep copy of the model runs itself, not this one.
        decoder = functools.partial(_run_decoder, self, names)
        self._replace(base, functools.update_wrapper(decoder, base.forward))
        if model.config.model_type in MODEL_TYPES:
            if base is not model and "logits_to_keep" in inspect.signature(model.forward).parameters:
                self._hooks.append(model.register_forward_pre_hook(ask_for_logits, with_kwargs=True))
            for i, layer in enumerate(base.layers):
                attention = layer.self_attn
                self._replace(layer, functools.partial(run_layer, i, layer.forward))
                self._replace(attention, functools.partial(run_attention, attention, attention.forward))
        model.__dict__["_octavo"] = self
        self.switch(swiftkv is not None)

    def undo(self) -> None:
        """Put everything back."""
        for module, before in self._replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self._attention_before)
        del self.model.__dict__["_octavo"]

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    # Modes and what they mean

    @property
    def adapter(self) -> Adapter | None:
        """The gates that were attached."""
        return self.modes.adapter

    @property
    def swiftkv(self) -> SwiftKVAdapter | None:
        """The transform that was attached."""
        return self.modes.swiftkv

    @property
    def adapters(self) -> list[Adapter | SwiftKVAdapter]:
        """What was attached."""
        return [a for a in (self.swiftkv, self.adapter) if a is not None]

    def switch(self, on: bool) -> None:
        """See `set_swiftkv`."""
        self.swiftkv_on = self.checked_mode(on) if on else False
        self.policy, self.transform = self.modes.oracle(self.swiftkv_on)
        self._ours = True

    def checked_mode(self, swiftkv: bool | None) -> bool:
        """The mode that was asked for, or the present one. Raises ConfigError for SwiftKV where there is none."""
        if swiftkv and self.swiftkv is None:
            raise ConfigError("this model has no SwiftKV adapter; attach one, as in octavo.attach(model, 'swiftkv')")
        return self.swiftkv_on if swiftkv is None else swiftkv

    @contextmanager
    def using(self, policy: Policy | None, swiftkv: SwiftKV | None = None) -> Iterator[None]:
        """Run forwards without a cache under another policy (soft gates, a baseline; None: dense) and transform."""
        before = self.policy, self.transform, self._ours
        self.policy, self.transform, self._ours = policy, swiftkv, False
        try:
            yield
        finally:
            self.policy, self.transform, self._ours = before

    def _present(self) -> tuple[Policy | None, SwiftKV | None]:
        """`policy` and `transform`; our own follow the model where it has been moved or cast since."""
        if isinstance(self.policy, HardGates):
            self.policy.gates.to(self.model.device)
        if self.transform is not None and self._ours:
            self.transform = self.modes.transform()
        return self.policy, self.transform

    # The decoder's forward

    def run(self, kwargs: dict[str, Any]) -> Any:
        """The decoder's forward, given all arguments by name."""
        asked, mode = kwargs.pop("octavo_keep", None), kwargs.pop("swiftkv", None)
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return self._forward(**kwargs)  # transformers says what is missing
        columns = tokens.shape[1]
        if columns == 0:
            raise PromptError("the prompt is empty; give at least one token")
        mask = kwargs.get("attention_mask")
        valid = padding(mask, columns)
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        layers: Any = self.model.base_model.layers
        if self.model.training and getattr(layers[0], "gradient_checkpointing", False) and not _held(past):
            past, use_cache = None, False  # layers that run again must not fill a cache again
            kwargs.update(past_key_values=past, use_cache=use_cache)
        if past is None and not (self.model.config.use_cache if use_cache is None else use_cache):
            policy, transform = self._present() if mode is None else self.modes.oracle(self.checked_mode(mode))
            step = Step(self._attention, policy=policy, valid=valid, swiftkv=transform)
            return self._forward(**kwargs, octavo_step=step)
        cache = self._cache(past, mode)
        self._check_length(cache, columns)
        if cache.seen and mask is not None and mask.ndim == 2 and mask.shape[1] == cache.seen + columns:
            cache.check_mask(mask)
        kwargs.update(past_key_values=cache, use_cache=True)
        return self._chunks(cache, kwargs, tokens, valid, asked)

    def _chunks(
        self, cache: "KVCache", kwargs: dict[str, Any], tokens: Tensor, valid: Tensor | None, asked: int | None
    ) -> Any:
        """All of the input through the decoder; `asked`: how many of the last tokens' logits are wanted."""
        batch, columns = tokens.shape[:2]
        # Pages are constants to autograd: where gradients are wanted, all of the input is one chunk.
        trains = torch.is_grad_enabled() and (
            tokens.requires_grad or any(p.requires_grad for p in self.model.parameters())
        )
        chunk = columns if trains or self._whole else self.settings.chunk
        wanted = columns if asked is None or trains or not cache.swiftkv else asked
        parts, before = [], cache.seen
        try:
            for first, last, keep in chunk_bounds(columns, chunk, wanted):
                part = kwargs if last - first == columns else part_of(kwargs, first, last)
                real = None if valid is None else valid[:, first:last]
                parts.append(self._step(cache, part, batch, last - first, real, keep))
        except BaseException:
            with suppress(CacheStateError):  # where that needs evicted tokens, the chunks that went well stay
                cache.crop(before - cache.seen)
            raise
        return join(parts)

    def _step(
        self, cache: "KVCache", kwargs: dict[str, Any], batch: int, columns: int, valid: Tensor | None, keep: int
    ) -> Any:
        """One chunk through the decoder; the cache changes only when all of it went well."""
        gates = self.modes.folded(cache.swiftkv)
        cache.begin(batch, columns, valid)
        step = Step(self._attention, cache, gates, keep=keep, swiftkv=self.modes.transform() if cache.swiftkv else None)
        try:
            out = self._forward(**kwargs, octavo_step=step)
            stores = range(cache.shape.stores)
            cache.commit(gates.marked_everywhere([step.hidden[s] for s in stores]) if gates and cache.late else None)
        except BaseException:
            cache.abandon()
            raise
        return out

    def _cache(self, past: object, mode: bool | None) -> "KVCache":
        if isinstance(past, KVCache):
            if past.owner != self.key:
                raise CacheStateError("this KVCache was made for another model or before the model was attached anew")
            wanted = past.fixed if mode is None and past.fixed is not None else self.checked_mode(mode)
            if past.swiftkv != wanted:
                if past.rows is not None or past.fixed is not None:
                    held, asked = ("with", "without") if past.swiftkv else ("without", "with")
                    done = "made" if past.rows is None else "filled"
                    raise CacheStateError(f"this KVCache was {done} {held} SwiftKV and cannot go on {asked} it")
                past.swiftkv, past.shape, past.eviction = wanted, self.modes.shape(wanted), self.modes.eviction(wanted)
            return past
        if past is None:
            return KVCache(self.model, swiftkv=mode)
        if type(past) is DynamicCache and not _held(past) and "octavo_replaced" not in past.__dict__:
            past.__dict__["octavo_replaced"] = True  # it stays empty: a second forward on it would forget the first
            return KVCache(self.model, swiftkv=mode)
        raise CacheStateError(
            f"an attached model keeps its keys in octavo.KVCache, not in {type(past).__name__}; "
            "pass octavo.KVCache(model) as past_key_values, or neither that nor cache_implementation"
        )

    def _check_length(self, cache: PagedCache, columns: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if columns > 1 and limit is not None and cache.seen + columns > limit:
            raise PromptError(
                f"the prompt has {cache.seen + columns:,} tokens, the model has {limit:,} positions; shorten it"
            )

    def run_layers(
        self,
        residual: Tensor,
        first: int,
        last: int,
        positions: Tensor,
        *,
        policy: Policy | None = None,
        swiftkv: SwiftKV | None = None,
        document: Tensor | None = None,
    ) -> list[Tensor]:
        """Decoder layers first..last-1 alone, without a cache: the residual streams [B, T, hidden] after each.

        `residual` [B, T, hidden] enters layer `first` (at most K with SwiftKV); `positions` [B, T] int64;
        `document` [B, T] int32 tells packed documents apart, -1 is padding. For training: gradients flow.
        """
        base: Any = self.model.base_model
        rotary = base.rotary_emb(residual, position_ids=positions)
        packed = None if document is None else Packed(document)
        step = Step(self._attention, policy=policy, swiftkv=swiftkv, packed=packed)
        streams = []
        for layer in base.layers[first:last]:
            residual = layer(
                residual,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotary,
                past_key_values=None,
                use_cache=False,
                octavo_step=step,
            )
            streams.append(residual)
        return streams


def _run_decoder(attachment: Attachment, names: list[str], *args: Any, **kwargs: Any) -> Any:
    """What an attached decoder's `forward` is; `names` are those of its own parameters."""
    return attachment.run({**dict(zip(names, args, strict=False)), **kwargs})


def _held(past: Any) -> bool:
    """Whether a cache, or none, holds tokens."""
    return past is not None and (not hasattr(past, "get_seq_length") or past.get_seq_length() > 0)
