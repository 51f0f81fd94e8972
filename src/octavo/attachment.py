"""Joins a Hugging Face model with gates, pages and attention, at seams that transformers offers; undoes it.

Three seams: the attention function (`AttentionInterface`), the cache (`Cache`), and the forward calls of the
decoder and of its attention modules. Nothing of the model is copied and nothing is global: all that the
attention function needs travels down with the call, as the keyword argument `octavo_step`.
"""

import functools
import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from octavo.attention import dense_attention
from octavo.config import CacheSettings
from octavo.dms.adapter import Adapter, check_fingerprint, load_adapter
from octavo.dms.policy import HardGates, Policy
from octavo.errors import CacheStateError, NotAttachedError, PromptError, UnsupportedModelError
from octavo.kv import CacheShape, PagedCache
from octavo.support import attention_modules, check_supported, fingerprint, head_dim

NAME = "octavo"
Model = TypeVar("Model", bound=PreTrainedModel)


def attach(
    model: Model,
    adapter: Adapter | str | Path | None = None,
    *,
    chunk: int = 512,
    page_size: int = 16,
    budget: int | None = None,
) -> Model:
    """Make `model` keep its keys and values on Octavo's pages, and evict as `adapter` says. Returns the model.

    `adapter`: an Adapter, a folder, or None: same pages, nothing evicted. `chunk`: tokens per prefill step.
    `budget`: bytes that one cache's pages may take. An attached model is detached first.

    Raises UnsupportedModelError, AdapterFileError, AdapterMismatchError or ConfigError; the model is then as
    it was.
    """
    check_supported(model)
    settings = CacheSettings(chunk, page_size, budget)
    if isinstance(adapter, str | Path):
        adapter = load_adapter(adapter)
    if adapter is not None:
        check_fingerprint(adapter, fingerprint(model))
    if attachment_of(model) is not None:
        detach(model)
    Attachment(model, adapter, settings)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model is exactly as it was before. Raises NotAttachedError when it was not attached."""
    require_attachment(model).undo()
    return model


def restore(model: PreTrainedModel, before: "Attachment | None") -> None:
    """Leave the model as `attachment_of` found it earlier: unattached, or with the same adapter and settings."""
    if attachment_of(model) is not None:
        detach(model)
    if before is not None:
        attach(model, before.adapter, **asdict(before.settings))


def attachment_of(model: PreTrainedModel) -> "Attachment | None":
    """What `attach` joined to this model, or None."""
    return model.__dict__.get("_octavo")


def require_attachment(model: PreTrainedModel) -> "Attachment":
    """What `attach` joined to this model; NotAttachedError where it joined nothing."""
    attachment = attachment_of(model)
    if attachment is None:
        raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
    return attachment


class KVCache(PagedCache):
    """A transformers `Cache` for an attached model; pass it to `generate` or to the model as `past_key_values`.

    `nbytes`: bytes held; `dense_nbytes`: bytes a dense cache would hold; `kept`: visible slots, int64
    [batch, layers, kv_heads]. `budget` (bytes) overrides the one given to `attach`.
    """

    def __init__(self, model: PreTrainedModel, *, budget: int | None = None) -> None:
        attachment = require_attachment(model)
        settings = attachment.settings
        if budget is not None:
            settings = CacheSettings(settings.chunk, settings.page_size, budget)
        eviction = attachment.adapter.gates.spec.eviction if attachment.adapter else None
        super().__init__(attachment.shape(), eviction, settings)
        self.owner = attachment.key


@dataclass
class Step:
    """What one forward of the decoder hands down to its attention function."""

    attachment: "Attachment"
    cache: PagedCache | None
    valid: Tensor | None = None  # [B, N] bool; without a cache only
    hidden: dict[int, Tensor] = field(default_factory=dict)  # by layer, so far: the attention's input [B, N, hidden]


class Attachment:
    """One model's join: its adapter and settings, and what is needed to undo it.

    `policy` decides what forwards without a cache forget (None: nothing); see `using`.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter | None, settings: CacheSettings) -> None:
        self.model = model
        self.adapter = adapter
        self.settings = settings
        self.policy: Policy | None = HardGates(adapter.gates) if adapter else None
        self.key = uuid.uuid4().hex  # what caches remember of it: survives deep copies, is never used again
        self._folded: tuple[Tensor, Tensor] | None = None
        self._attention_before = model.config._attn_implementation
        base = model.base_model
        self._forward_before = base.__dict__.get("forward")
        self._forward: Callable[..., Any] = base.forward
        self._hooks = [
            m.register_forward_pre_hook(_remember_hidden, with_kwargs=True) for m in attention_modules(model)
        ]
        model.set_attn_implementation(NAME)
        base.forward = self._wrap(base)
        model.__dict__["_octavo"] = self

    def undo(self) -> None:
        """Put everything back."""
        base = self.model.base_model
        if self._forward_before is None:
            del base.__dict__["forward"]
        else:
            base.__dict__["forward"] = self._forward_before
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self._attention_before)
        del self.model.__dict__["_octavo"]

    @contextmanager
    def using(self, policy: Policy | None) -> Iterator[None]:
        """Run forwards without a cache under another policy: soft gates, a baseline, or None for dense."""
        before, self.policy = self.policy, policy
        try:
            yield
        finally:
            self.policy = before

    def shape(self) -> CacheShape:
        """What a cache for this model must look like, where the model lies now."""
        config = self.model.config
        heads = config.num_key_value_heads
        return CacheShape(config.num_hidden_layers, heads, head_dim(config), self.model.dtype, self.model.device)

    def marked(self, layer: int, hidden: Tensor) -> Tensor | None:
        """The gate's decisions [B, kv_heads, N] bool from the attention input [B, N, hidden]; None without gates."""
        if self.adapter is None:
            return None
        weight, bias = self._gates(hidden.device)
        marked = (F.linear(hidden.float(), weight[layer], bias[layer]) > 0).transpose(1, 2)
        return marked.expand(-1, self.adapter.gates.spec.kv_heads, -1)

    def marked_everywhere(self, hidden: list[Tensor]) -> Tensor | None:
        """`marked` for all layers at once, [L, B, kv_heads, N] bool."""
        if self.adapter is None:
            return None
        weight, bias = self._gates(hidden[0].device)
        inputs = torch.stack(hidden).float().flatten(1, 2)  # [L, B*N, hidden]
        marked = torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2)) > 0  # [L, B*N, outputs]
        marked = marked.view(len(hidden), *hidden[0].shape[:2], -1).transpose(2, 3)
        return marked.expand(-1, -1, self.adapter.gates.spec.kv_heads, -1)

    def _gates(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._folded is None or self._folded[0].device != device:
            assert self.adapter is not None
            self._folded = self.adapter.gates.folded(device)
        return self._folded

    # The decoder's forward

    def _wrap(self, base: nn.Module) -> Callable[..., Any]:
        names = list(inspect.signature(self._forward).parameters)

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run({**dict(zip(names, args, strict=False)), **kwargs})

        return forward

    def _run(self, kwargs: dict[str, Any]) -> Any:
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return self._forward(**kwargs)  # transformers says what is missing
        batch, columns = tokens.shape[:2]
        if columns == 0:
            raise PromptError("the prompt is empty; give at least one token")
        valid = _padding(kwargs.get("attention_mask"), columns)
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if past is None and not (self.model.config.use_cache if use_cache is None else use_cache):
            return self._forward(**kwargs, octavo_step=Step(self, None, valid))
        cache = self._cache(past)
        self._check_length(cache, columns)
        kwargs.update(past_key_values=cache, use_cache=True)
        # Pages are constants to autograd: where gradients are wanted, all of the input is one chunk.
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        chunk = columns if trains else self.settings.chunk
        if columns <= chunk:
            return self._step(cache, kwargs, batch, columns, valid)
        parts = []
        for first in range(0, columns, chunk):
            last = min(first + chunk, columns)
            part = _slice(kwargs, first, last)
            parts.append(self._step(cache, part, batch, last - first, None if valid is None else valid[:, first:last]))
        return _join(parts)

    def _step(self, cache: PagedCache, kwargs: dict[str, Any], batch: int, columns: int, valid: Tensor | None) -> Any:
        """One chunk through the decoder; the cache changes only when all of it went well."""
        cache.begin(batch, columns, valid)
        step = Step(self, cache)
        try:
            out = self._forward(**kwargs, octavo_step=step)
            cache.commit(self.marked_everywhere(list(step.hidden.values())) if cache.late else None)
        except BaseException:
            cache.abandon()
            raise
        return out

    def _cache(self, past: object) -> PagedCache:
        if isinstance(past, KVCache):
            if past.owner != self.key:
                raise CacheStateError("this KVCache was made for another model or before the model was attached anew")
            return past
        if past is None or (type(past) is DynamicCache and past.get_seq_length() == 0):
            return KVCache(self.model)
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


def _remember_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step: Step | None = kwargs.get("octavo_step")
    if step is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without its decoder, which hands down the step"
        )
    layer: Any = module.layer_idx
    step.hidden[layer] = args[0] if args else kwargs["hidden_states"]


def _padding(mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of the new tokens are real, [B, columns] bool, from a 2-D mask that ends with them; None: all are."""
    if mask is None or mask.ndim != 2 or bool(mask[:, -columns:].all()):
        return None
    return mask[:, -columns:].bool()


def _slice(kwargs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The arguments of tokens first..last of a long forward; its 2-D mask is with the step already."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids", "cache_position"):
        value = part.get(name)
        if value is not None:
            part[name] = value[first:last] if name == "cache_position" else value[:, first:last]
    mask = part.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        part["attention_mask"] = None
    return part


def _join(parts: list[Any]) -> Any:
    """One output of many chunks': token dimensions joined, the cache taken from the last."""
    out = parts[-1]
    if isinstance(out, tuple):
        return (torch.cat([p[0] for p in parts], 1), *out[1:])
    out.last_hidden_state = torch.cat([p.last_hidden_state for p in parts], 1)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(torch.cat(h, 1) for h in zip(*(p.hidden_states for p in parts), strict=True))
    return out


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    octavo_step: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: [B, N, Hq, D]."""
    if octavo_step is None:
        raise NotAttachedError(f"attention '{NAME}' needs a model prepared by octavo.attach")
    if attention_mask is not None:
        raise UnsupportedModelError("custom 4-D attention masks are not supported; pass a 2-D padding mask")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} asks for {name}, which Octavo does not compute")
    if dropout:
        raise UnsupportedModelError("attention dropout is not supported; call model.eval()")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step, hidden = octavo_step, octavo_step.hidden[layer]
    if step.cache is not None:
        marked = None if step.cache.late else step.attachment.marked(layer, hidden)
        return step.cache.attend(layer, query, marked, scale), None
    policy = step.attachment.policy
    log_keep = policy.log_keep(layer, hidden, key) if policy else None
    return dense_attention(query, key, value, log_keep, policy.window if policy else 0, scale, step.valid), None


def _mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> None:
    """Padding travels with the step, and causality is the visibility rule; anything else is refused."""
    if mask_function is not causal_mask_function:
        raise UnsupportedModelError("packed sequences and mask overlays are not supported; pad instead")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
