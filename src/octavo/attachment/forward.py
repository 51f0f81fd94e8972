"""What runs inside a model's forward: the attention function, and the layers that SwiftKV transforms.

Nothing is global: all that they need travels down with the call, as the keyword argument `octavo_step`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from octavo.attention import Packed, dense_attention
from octavo.dms import FoldedGates, Policy
from octavo.errors import NotAttachedError, UnsupportedModelError
from octavo.kv import PagedCache
from octavo.swiftkv import SwiftKV
from octavo.swiftkv.transform import Rotary

NAME = "octavo"


@dataclass
class Step:
    """What one forward of the decoder hands down to its layers.

    With a cache, `gates` decide what it forgets; without one, `policy` does, and `valid` marks real tokens or
    `packed` tells documents apart.
    """

    attention: list[nn.Module]  # the model's attention modules
    cache: PagedCache | None = None
    gates: FoldedGates | None = None
    policy: Policy | None = None
    valid: Tensor | None = None  # [B, N] bool
    packed: Packed | None = None
    swiftkv: SwiftKV | None = None
    keep: int | None = None  # SwiftKV's later layers run for so many of the last tokens; None: for all
    hidden: dict[int, Tensor] = field(default_factory=dict)  # by store: what keys are projected from, [B, N, hidden]
    shared: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)  # see `enter`

    def transforms(self, layer: int) -> bool:
        """Whether SwiftKV runs this layer."""
        return self.swiftkv is not None and layer >= self.swiftkv.spec.kv_layers

    @property
    def deciding(self) -> FoldedGates | None:
        """The gates, where the cache wants their marks now: not where they may come with `commit`."""
        return self.gates if self.cache is not None and not self.cache.late else None

    def enter(self, residual: Tensor, rotary: Rotary) -> None:
        """Make the keys and values of all stores from layer K on, from the residual stream [B, N, hidden] before it.

        They go to the cache, or without one to `shared` (key, value, log_keep), since a group's layers share them.
        """
        assert self.swiftkv is not None
        spec = self.swiftkv.spec
        n = self.swiftkv.normalised(residual)
        keys, values = self.swiftkv.keys_values(n, self.attention, rotary)
        gates = self.deciding
        marked = gates.marked_from(spec.kv_layers, n) if gates else None
        for i in range(spec.upper_stores):
            store = spec.kv_layers + i
            self.hidden[store] = n
            if self.cache is None:
                log_keep = self.policy.log_keep(store, n, keys[i]) if self.policy else None
                self.shared[store] = (keys[i], values[i], log_keep)
            else:
                self.cache.update(keys[i], values[i], store)
                self.cache.mark(store, None if marked is None else marked[i])

    def masked(self, query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor | None, scale: float) -> Tensor:
        """Attention of a forward without a cache, [B, N, Hq, D]."""
        window = self.policy.window if self.policy else 0
        return dense_attention(query, key, value, log_keep, window, scale, self.valid, self.packed)


def ask_for_logits(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook on the whole model: tell the decoder how many of the last tokens' logits are asked for."""
    keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 1 or kwargs.get("labels") is not None:
        return None
    config: Any = module.config
    for name in ("output_hidden_states", "output_attentions"):
        value = kwargs.get(name)
        if getattr(config, name, False) if value is None else value:
            return None
    return args, {**kwargs, "octavo_keep": keep}


def remember_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook on attention modules: the gate reads what keys and values are projected from."""
    step: Step | None = kwargs.get("octavo_step")
    if step is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without its decoder, which hands down the step"
        )
    layer: Any = module.layer_idx
    if not step.transforms(layer):
        step.hidden[layer] = args[0] if args else kwargs["hidden_states"]


def run_layer(layer: int, forward: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer's forward that SwiftKV may enter or skip; anything else goes to its own, `forward`."""
    step: Step | None = kwargs.get("octavo_step")
    if step is None or step.swiftkv is None or not step.transforms(layer):
        return forward(hidden_states, *args, **kwargs)
    rotary: Rotary = kwargs["position_embeddings"]
    if layer == step.swiftkv.spec.kv_layers:
        step.enter(hidden_states, rotary)
    if step.keep is not None and step.keep < rotary[0].shape[1]:  # the others are done: keys and values are held
        first = rotary[0].shape[1] - step.keep
        if layer == step.swiftkv.spec.kv_layers:
            hidden_states = hidden_states[:, first:]
        if step.keep == 0:
            return hidden_states
        kwargs["position_embeddings"] = (rotary[0][:, first:], rotary[1][:, first:])
    return forward(hidden_states, *args, **kwargs)


def run_attention(
    module: nn.Module, forward: Callable[..., Any], *args: Any, octavo_step: Step | None = None, **kwargs: Any
) -> Any:
    """An attention module's forward: its own, or from layer K on queries alone, over keys and values made before."""
    layer: Any = module.layer_idx
    if octavo_step is None or not octavo_step.transforms(layer):
        return forward(*args, octavo_step=octavo_step, **kwargs)
    step, swiftkv = octavo_step, octavo_step.swiftkv
    assert swiftkv is not None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    rotary: Rotary = kwargs["position_embeddings"]
    _refuse(module, kwargs.get("attention_mask"), 0.0, kwargs)
    query = swiftkv.query(layer, hidden, module, rotary)
    store, scale = swiftkv.spec.store(layer), float(module.scaling)  # type: ignore[arg-type]
    if step.cache is not None:
        out = step.cache.attend(store, query, scale)
    else:
        out = step.masked(query, *step.shared[store], scale)
    return module.o_proj(out.reshape(*hidden.shape[:2], -1)), None  # type: ignore[operator]


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
        raise NotAttachedError(
            f"attention '{NAME}' needs a model prepared by octavo.attach, "
            "and a model that shares its configuration with an attached one needs one of its own"
        )
    _refuse(module, attention_mask, dropout, kwargs)
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step, hidden = octavo_step, octavo_step.hidden[layer]
    if step.cache is not None:
        gates = step.deciding
        step.cache.mark(layer, gates.marked(layer, hidden) if gates else None)
        return step.cache.attend(layer, query, scale), None
    log_keep = step.policy.log_keep(layer, hidden, key) if step.policy else None
    return step.masked(query, key, value, log_keep, scale), None


def _refuse(module: nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for what Octavo's attention does not compute."""
    if attention_mask is not None:
        raise UnsupportedModelError("custom 4-D attention masks are not supported; pass a 2-D padding mask")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} asks for {name}, which Octavo does not compute")
    if dropout:
        raise UnsupportedModelError("attention dropout is not supported; call model.eval()")


def _mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> None:
    """Padding travels with the step, and causality is the visibility rule; anything else is refused."""
    if mask_function is not causal_mask_function:
        raise UnsupportedModelError("packed sequences and mask overlays are not supported; pad instead")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
