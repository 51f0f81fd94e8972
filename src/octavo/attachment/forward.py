"""What runs inside a model's forward: the attention function, and the layers that SwiftKV transforms.

Nothing is global: all that they need travels down with the call, as the keyword argument `octavo_forward`, or where a
model's layers drop what they do not know, as a context variable of the running call.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from octavo.attachment.borrowed import take_channel
from octavo.attachment.layout import NUMBER, Layout
from octavo.attachment.masks import mask
from octavo.attention import Lifetime, Packed, Scoring, dense_attention
from octavo.dms import FoldedGates, Policy
from octavo.errors import NotAttachedError, UnsupportedModelError
from octavo.kv import PagedCache
from octavo.swiftkv import SwiftKV
from octavo.swiftkv.transform import Rotary, shifted

NAME = "octavo"
RUNNING: ContextVar["Forward | None"] = ContextVar("octavo_forward", default=None)  # see `Attachment.run`


@dataclass
class Forward:
    """One forward of the decoder, as its layers see it.

    With a cache, `gates` decide what it forgets; without one, `policy` does, and `valid` marks real tokens or
    `packed` tells documents apart. Layers in which the tokens of a picture see each other need both: they attend as
    without a cache.
    """

    layout: Layout  # of the model
    cache: PagedCache | None = None  # on which a step has begun
    gates: FoldedGates | None = None
    policy: Policy | None = None
    valid: Tensor | None = None  # [B, N] bool
    packed: Packed | None = None
    pictures: tuple[Tensor | None, ...] = ()  # by KV layer which picture tokens belong to, [B, N], -1: none; or ()
    transform: SwiftKV | None = None
    borrowed: bool = False  # whether queries lend a channel to gates
    rotary: Rotary | None = None  # what they were turned by, for these models
    keep: int | None = None  # SwiftKV's later layers run for so many of the last tokens; None: for all
    entering: Tensor | None = None  # what the keys of the layer that runs now come from, [B, N, hidden]
    undecided: list[Tensor] = field(default_factory=list)  # the same of all layers so far, where marks can wait
    shared: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)  # see `enter`
    kept: dict[int, Tensor | None] = field(default_factory=dict)  # what `policy` says of KV layers that others read too

    def transforms(self, layer: int) -> bool:
        """Whether SwiftKV runs this layer."""
        return self.transform is not None and layer >= self.transform.spec.kv_layers

    @property
    def reads_channel(self) -> bool:
        """Whether the gates that decide read the channels that queries lend."""
        gates = getattr(self.policy, "gates", None) if self.gates is None else self.gates
        return gates is not None and gates.spec.borrowed

    def store(self, first: int, hidden: list[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Give the cache the new keys and values [B, H, N, D] of KV layers `first`..., and what it forgets of them.

        `hidden`: what each layer's keys come from, [B, N, hidden]. A chunk must know its marks before it attends, and
        nothing keeps its hidden states. The few tokens of a decode step all outlive the step, so their marks wait for
        `commit`, which decides for all layers in one operation.
        """
        assert self.cache is not None
        step = self.cache.step
        if step.decides_at_commit:
            self.undecided += hidden
        marked = None if step.decides_at_commit else self._decided(first, hidden)
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            step.update(first + i, key, value, None if marked is None else marked[i])

    def commit(self) -> None:
        """End a forward on a cache that went well. Raises NotAttachedError where layers are missing."""
        assert self.cache is not None
        self.cache.commit(self.decided())

    def decided(self) -> Tensor | None:
        """The marks [L, B, H, N] bool that waited for the end, None: there are none."""
        marked = self._decided(0, self.undecided) if self.undecided else None
        if marked is None or self.cache is None or not self.cache.shape.hands:
            return marked
        return torch.cat([marked, torch.ones_like(marked[:1])])  # see `_hand_on`

    def _decided(self, first: int, hidden: list[Tensor]) -> Tensor | None:
        """What the gates forget of KV layers `first`...: marks [l, B, H, N] bool; None: they forget nothing."""
        return None if self.gates is None else self.gates.marked(first, hidden)

    def attend(
        self, layer: int, query: Tensor, scale: float, last_reader: bool, scoring: Scoring | None = None
    ) -> Tensor:
        """Attention over one KV layer of the cache, [B, n, Hq, D]; after its last reader nothing of it is held back."""
        assert self.cache is not None
        out = self.cache.step.attend(layer, query, scale, scoring)
        if last_reader:
            self.cache.step.settle(*self.cache.shape.done_with(layer))
        return out

    def paged(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float,
        scoring: Scoring | None,
    ) -> Tensor:  # fmt: skip
        """One attention module's attention over the cache, [B, N, Hq, value's D], after its keys have gone there."""
        layout = self.layout
        kv_layer, heads, D, width = layout.reads[number], layout.kv_heads, layout.head_dim, value.shape[-1]
        group, query_heads = query.shape[1] // key.shape[1], query.shape[1]
        if layout.owns[number]:
            self.store(kv_layer, [hidden], [filled(key, heads, D)], [filled(value, heads, D)])
        if scoring is not None and scoring.sinks is not None and query_heads < heads * group:
            scoring = scoring._replace(sinks=nn.functional.pad(scoring.sinks, (0, heads * group - query_heads)))
        if self.pictures and self.pictures[kv_layer] is not None:
            return self._both_ways(number, query, key, value, hidden, scale, scoring)
        out = self.attend(kv_layer, filled(query, heads * group, D), scale, layout.last[number], scoring)
        return out if out.shape[2:] == (query_heads, width) else out[:, :, :query_heads, :width]

    def _both_ways(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float,
        scoring: Scoring | None,
    ) -> Tensor:  # fmt: skip
        """The same for the first tokens of a text, of which those of a picture see each other: no page is read."""
        assert self.cache is not None
        if self.layout.last[number]:
            self.cache.step.settle(self.layout.reads[number])
        return self.whole(number, query, key, value, hidden, scale, scoring)

    def whole(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float,
        scoring: Scoring | None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """One attention module's attention over all of the input, as without a cache, [B, N, Hq, D]."""
        layout, kv_layer = self.layout, self.layout.reads[number]
        if self.policy is None or not layout.owns[number]:
            kept = self.kept.get(kv_layer)
        else:
            kept = self.policy.log_keep(kv_layer, hidden, key)
            if not layout.last[number]:
                self.kept[kv_layer] = kept  # for good: checkpoints run readers again before the layer that they read
        log_keep = None if kept is None else kept[:, : key.shape[1]]  # gates have the most heads of any layer
        pictures = self.pictures[kv_layer] if self.pictures else None
        lifetime = layout.lifetimes[kv_layer]
        return self.masked(query, key, value, log_keep, scale, lifetime, scoring, dropout, pictures)

    def enter(self, residual: Tensor, rotary: Rotary) -> None:
        """Make the keys and values of all KV layers from K on, from the residual stream [B, N, hidden] before layer K.

        They go to the cache, or without one to `shared` (key, value, log_keep), since a group's layers share them.
        """
        assert self.transform is not None
        spec = self.transform.spec
        n = self.transform.normalised(residual)
        handed = self.transform.handed(n) if spec.before else None
        given = None if handed is None else self._given(handed)
        keys, values = self.transform.keys_values(n, self.layout.attention, rotary, given)
        if self.cache is None:
            for i, layer in enumerate(range(spec.kv_layers, spec.cached_layers)):
                log_keep = self.policy.log_keep(layer, n, keys[i]) if self.policy else None
                self.shared[layer] = (keys[i], values[i], log_keep)
            return
        upper = range(spec.kv_layers, self.cache.shape.read_layers)  # fewer than all where generation exits early
        for i, layer in enumerate(upper):
            self.cache.update(keys[i], values[i], layer)
        self.store(spec.kv_layers, [n] * len(upper), keys[: len(upper)].unbind(), values[: len(upper)].unbind())
        if handed is not None:
            self._hand_on(handed)
        if self.keep == 0:  # no layer reads what was stored
            for layer in upper:
                self.cache.step.settle(*self.cache.shape.done_with(layer))

    def _given(self, handed: Tensor) -> Tensor:
        """What the token before each handed on, [B, N, before], where they themselves hand on `handed`."""
        if self.cache is None:
            return shifted(handed, None if self.packed is None else self.packed.document, self.valid)
        assert self.transform is not None
        step = self.cache.step
        first = self.transform.from_slots(*step.newest(self.cache.shape.read_layers, handed.dtype))
        return shifted(handed, valid=step.valid, first=first)

    def _hand_on(self, handed: Tensor) -> None:
        """Store what tokens hand on in a KV layer of its own; gates, where there are any, mark all of it, since nobody
        asks for more than the newest, and what may be taken back."""
        assert self.transform is not None
        assert self.cache is not None
        layer = self.cache.shape.read_layers
        key, value = self.cache.update(*self.transform.as_slots(handed), layer)
        step, marked = self.cache.step, None
        if self.gates is not None and not step.decides_at_commit:
            marked = torch.ones(key.shape[:3], dtype=torch.bool, device=key.device)
        step.update(layer, key, value, marked)

    def masked(
        self, query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor | None, scale: float,
        lifetime: Lifetime | None = None, scoring: Scoring | None = None, dropout: float = 0.0,
        pictures: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a forward without a cache, [B, N, Hq, D]."""
        window = self.policy.window if self.policy else 0
        special = lifetime, scoring, dropout, pictures
        return dense_attention(query, key, value, log_keep, window, scale, self.valid, self.packed, *special)


def filled(tensor: Tensor, heads: int, elements: int) -> Tensor:
    """Heads [B, h, N, D] with zeros behind their elements and more heads of zeros: products stay what they are."""
    more = heads - tensor.shape[1], elements - tensor.shape[-1]
    return tensor if more == (0, 0) else nn.functional.pad(tensor, (0, more[1], 0, 0, 0, more[0]))


def asked_for(name: str, kwargs: dict[str, Any], config: Any, default: bool = False) -> bool:
    """Whether a call asks for something: by its argument `name`, else by the model's configuration, else `default`."""
    value = kwargs.get(name)
    return bool(getattr(config, name, default) if value is None else value)


def ask_for_logits(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook on the whole model: tell the decoder how many of the last tokens' logits are asked for."""
    keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 1 or kwargs.get("labels") is not None:
        return None
    if asked_for("output_hidden_states", kwargs, module.config):
        return None
    return args, {**kwargs, "octavo_keep": keep}


def remember_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook on attention modules: the gate reads what keys and values are projected from."""
    forward: Forward | None = kwargs.get("octavo_forward") or RUNNING.get()
    if forward is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without its decoder, which hands down the forward"
        )
    if not forward.transforms(getattr(module, "layer_idx", -1)):
        forward.entering = args[0] if args else kwargs["hidden_states"]


def run_layer(layer: int, original: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer's forward that SwiftKV may enter or skip; anything else goes to its own, `original`."""
    forward: Forward | None = kwargs.get("octavo_forward")
    if forward is None or forward.transform is None or not forward.transforms(layer):
        return original(hidden_states, *args, **kwargs)
    rotary: Rotary = kwargs["position_embeddings"]
    if layer == forward.transform.spec.kv_layers:
        forward.enter(hidden_states, rotary)
    if forward.keep is not None and forward.keep < rotary[0].shape[1]:  # the others are done: their KV is held
        first = rotary[0].shape[1] - forward.keep
        if layer == forward.transform.spec.kv_layers:
            hidden_states = hidden_states[:, first:]
        if forward.keep == 0:
            return hidden_states
        kwargs["position_embeddings"] = (rotary[0][:, first:], rotary[1][:, first:])
    return original(hidden_states, *args, **kwargs)


def run_attention(
    module: nn.Module, original: Callable[..., Any], *args: Any, octavo_forward: Forward | None = None, **kwargs: Any
) -> Any:
    """An attention module's forward: its own, or from layer K on queries alone, over keys and values made before."""
    layer: Any = module.layer_idx
    if octavo_forward is not None and octavo_forward.borrowed:
        octavo_forward.rotary = kwargs["position_embeddings"]
    if octavo_forward is None or not octavo_forward.transforms(layer):
        return original(*args, octavo_forward=octavo_forward, **kwargs)
    forward, transform = octavo_forward, octavo_forward.transform
    assert transform is not None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    rotary: Rotary = kwargs["position_embeddings"]
    _refuse(kwargs.get("attention_mask"))
    query = transform.query(layer, hidden, module, rotary)
    kv_layer, scale = transform.spec.kv_layer_of(layer), float(module.scaling)  # type: ignore[arg-type]
    if forward.cache is not None:
        last = layer + 1 == forward.cache.shape.layers or transform.spec.kv_layer_of(layer + 1) != kv_layer
        out = forward.attend(kv_layer, query, scale, last)
    else:
        dropout = getattr(module, "attention_dropout", 0.0) if module.training else 0.0
        out = forward.masked(query, *forward.shared[kv_layer], scale, dropout=dropout)
    return module.o_proj(out.reshape(*hidden.shape[:2], -1)), None  # type: ignore[operator]


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    octavo_forward: Forward | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: [B, N, Hq, D]."""
    octavo_forward = octavo_forward or RUNNING.get()
    if octavo_forward is None:
        raise NotAttachedError(
            f"attention '{NAME}' needs a model prepared by octavo.attach, "
            "and a model that shares its configuration with an attached one needs one of its own"
        )
    _refuse(attention_mask)
    number: int = module.__dict__[NUMBER]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    forward, hidden = octavo_forward, octavo_forward.entering
    if hidden is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends more than once in a layer, and Octavo keeps one set of keys per layer"
        )
    forward.entering = None  # else the forward would keep it alive
    if forward.borrowed:
        assert forward.rotary is not None
        query, channel = take_channel(query, key.shape[1], forward.rotary)
        hidden = channel if forward.reads_channel else hidden
    scoring = None if softcap is None and s_aux is None else Scoring(softcap, s_aux)
    if forward.cache is not None:
        if dropout:
            raise UnsupportedModelError(
                f"{type(module).__name__} drops attention weights in training, which attention over a cache does not; "
                "pass use_cache=False, or call model.eval()"
            )
        return forward.paged(number, query, key, value, hidden, scale, scoring).contiguous(), None
    return forward.whole(number, query, key, value, hidden, scale, scoring, dropout).contiguous(), None


def _refuse(attention_mask: Tensor | None) -> None:
    """Raise UnsupportedModelError for what Octavo's attention does not compute."""
    if attention_mask is not None and attention_mask.ndim > 2:
        raise UnsupportedModelError("custom 4-D attention masks are not supported; pass a 2-D padding mask")


def _mask(**kwargs: Any) -> Tensor | None:
    """The mask function beside it; inside a decoder nothing else reads masks, and what it gives looks like none."""
    if torch.compiler.is_compiling():  # which knows no context variables; what is made looks like no mask to attention
        return mask(**kwargs)
    running = RUNNING.get()
    made = mask(**kwargs, packed=running is not None and running.packed is not None)
    return made if running is None else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
