"""Which models can be attached: every requirement is checked by name, and a refusal says which one failed."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from octavo.attachment.forward import NAME
from octavo.attachment.layout import Layout, decoder_of, final_norm, hooks_of, joined, runs_on, unwrapped
from octavo.attachment.states import state_layers
from octavo.attachment.trial import Trial, tried
from octavo.attention import Lifetime
from octavo.config import NEVER
from octavo.errors import UnsupportedModelError

NORM_SAMPLE = 64  # values of the final norm's weight kept in a fingerprint
_WINDOWS = {  # by kind of layer: the setting that says how long its tokens are visible, None: they always are
    "full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size",
    "hybrid": None, "hybrid_sliding": "sliding_window", "linear_attention": None, "conv": None, "mamba": None,
    "attention": None, "moe": None, "mlp": None,
}  # fmt: skip
_ONE_BY_ONE = ("jamba", "recurrent_gemma", "zamba")  # whose layers go on from a state with one token at a time
_REFUSED = {  # by model type: what a trial of a few tokens does not show
    "recurrent_gemma": "lets padding into the states of its layers, so its answers depend on it, unattached too",
}
_LATENT = ("kv_lora_rank", "q_lora_rank")


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where `layout_of` does, and where adapters could not be trained on a model.

    One that is attached has been found fit.
    """
    if "_octavo" not in joined(model).__dict__ and layout_of(model).runs_on is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded: its weights come to its device only while they are used; load it "
            "whole to train adapters on it"
        )


def layout_of(model: PreTrainedModel) -> Layout:
    """Where a model, or the language model inside it, has its attention and keys.

    Raises UnsupportedModelError unless it is a decoder whose layers attend to keys by position alone. Windows, logit
    softcapping and sinks are part of it, and layers may have a state of their own. docs/models.md says which models
    are tested. One forward of a few tokens is run on the model (`octavo.attachment.trial`).
    """
    outer, model = unwrapped(model), joined(model)
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; its cross-attention cache is not supported")
    if getattr(config, "cross_attention_layers", None) or any("encoder_attn" in n for n, _ in model.named_modules()):
        raise UnsupportedModelError(f"{name} has layers of cross-attention, whose cache is not supported")
    if config.model_type in _REFUSED:
        raise UnsupportedModelError(f"{name} {_REFUSED[config.model_type]}")
    if any(getattr(config, key, None) for key in _LATENT):
        raise UnsupportedModelError(
            f"{name} uses latent attention: its cache holds one small latent for all heads, and Octavo's pages would "
            "hold each head's keys, in many times the bytes"
        )
    if getattr(config, "use_bidirectional_attention", None) is True or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{name} attends in both directions; only causal attention is supported")
    if config._attn_implementation == NAME:
        raise UnsupportedModelError(
            f"another attached model holds this {name} or shares its configuration; "
            "attach that one alone, or give this one a configuration of its own"
        )
    if any(hasattr(module, "lambda_init") for module in model.modules()):
        raise UnsupportedModelError(
            f"{name} has differential attention, which attends twice in a layer; Octavo's attention does so once"
        )
    where, devices = runs_on(model), {p.device for p in decoder_of(model).parameters()}
    if where is not None:
        devices = {where} | (devices - {torch.device("meta")})
    if len(devices) > 1:
        raise UnsupportedModelError(f"{name} lies on {len(devices)} devices; put it on one")
    return replace(_layout(model, tried(outer, model, where or model.device)), runs_on=where)


def _layout(model: PreTrainedModel, trial: Trial) -> Layout:
    """What a trial has shown. Raises UnsupportedModelError where it does not fit."""
    name, stored = type(model).__name__, trial.stored
    if any(call.query_heads % stored[call.kv_layer].key.shape[1] for call in trial.calls):
        raise UnsupportedModelError(f"{name} has query heads that its KV heads do not divide")
    unread = set(range(len(stored))) - {call.kv_layer for call in trial.calls}
    if unread:
        raise UnsupportedModelError(f"{name} gives its cache keys of {len(unread)} layers that nothing attends to")
    stores, reads = tuple(s.layer for s in stored), tuple(call.kv_layer for call in trial.calls)
    lifetimes = _lifetimes(model, stores)
    if any(life is not None for life in lifetimes) and not trial.windows:
        raise UnsupportedModelError(f"{name}'s configuration has a window that its masks do not have")
    ours = type(model).__module__.startswith("transformers.")
    return Layout(
        attention=tuple(call.module for call in trial.calls),
        reads=reads,
        owns=tuple(layer not in reads[:i] for i, layer in enumerate(reads)),
        last=tuple(layer not in reads[i + 1 :] for i, layer in enumerate(reads)),
        stores=stores,
        shapes=tuple((s.key.shape[1], s.key.shape[-1], s.value.shape[-1]) for s in stored),
        lifetimes=lifetimes,
        scored=any(call.scored for call in trial.calls),
        states=bool(state_layers(model.config)),
        continues=ours and model.config.model_type not in _ONE_BY_ONE,
        keywords=all(call.keywords for call in trial.calls),
    )


def _lifetimes(model: PreTrainedModel, stores: tuple[int, ...]) -> tuple[Lifetime | None, ...]:
    """How long the tokens of each layer that stores keys are visible, None where it attends to everything.

    A window at or past the model's positions is none. Raises UnsupportedModelError for layers of another kind.
    """
    config: Any = model.config
    name, most = type(model).__name__, reach_of(config).most or NEVER
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * (max(stores) + 1)
    if len(kinds) <= max(stores) or (others := sorted({str(k) for k in kinds} - set(_WINDOWS))):
        what = ", ".join(others) if len(kinds) > max(stores) else f"only {len(kinds)}"
        raise UnsupportedModelError(f"{name} has {what} layer types; {', '.join(_WINDOWS)} are supported")
    out: list[Lifetime | None] = []
    for layer in stores:
        setting = _WINDOWS[kinds[layer]]
        length = getattr(config, setting, None) if setting else None
        if setting and not length:
            raise UnsupportedModelError(f"{name} has layers of {kinds[layer]} and sets no {setting}")
        chunked = kinds[layer] == "chunked_attention"
        out.append(Lifetime(int(length), chunked) if length and length < most else None)
    return tuple(out)


class Reach(NamedTuple):
    """How long texts may be, in tokens."""

    most: int | None  # positions that the model has; None: there is no end, or none is known
    steady: int | None  # past so many RoPE's frequencies are others, for all tokens of a forward; None: never

    @property
    def in_pieces(self) -> int | None:
        """How long a text may be that is read in pieces, or beside others."""
        return min((limit for limit in self if limit is not None), default=None)

    @property
    def why(self) -> str:
        """What to say of `in_pieces` to people."""
        return "" if self.steady is None else ", past which its RoPE changes, for texts that are read whole (generate)"


def reach_of(config: Any) -> Reach:
    """What a configuration says of it: longrope has other factors past its first limit, dynamic RoPE grows for ever."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    most: int | None = getattr(config, "max_position_embeddings", None) or None
    kinds = {one.get("rope_type", one.get("type")): one for one in each}
    if "dynamic" in kinds:
        return Reach(None, most)
    if "longrope" not in kinds:
        return Reach(most, None)
    first = kinds["longrope"].get("original_max_position_embeddings")
    return Reach(most, first or getattr(config, "original_max_position_embeddings", None) or most)


def head_dim(config: Any) -> int:
    """Elements of one key, the most where layers differ."""
    return _most(config, "head_dim") or int(config.hidden_size // config.num_attention_heads)


def _most(config: Any, name: str) -> int | None:
    """A setting of a configuration, or the greatest where its layers have their own; None: it has none."""
    each = list(getattr(config, "per_layer_config", None) or [config])  # before transformers 5.20 there are none
    found = [value for one in each if (value := getattr(one, name, None)) is not None]
    return max(map(int, found)) if found else None


def shape_of(config: Any) -> dict[str, int]:
    """The shape of a model's gates, under the names that configurations have for it: `num_hidden_layers` of them, where
    some layers store no keys fewer than the model has; `hidden_size` of what attention reads; `num_key_value_heads`."""
    layers = config.num_hidden_layers
    if state_layers(config) or getattr(config, "kv_sharing_modes", None):
        layers = sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)
    heads = _most(config, "num_key_value_heads")
    if heads is None:
        heads = 1 if getattr(config, "multi_query", False) else config.num_attention_heads
    if config.model_type == "mimo_v2_flash":  # its layers with windows have twice as many as it says
        heads *= 2
    hidden = getattr(config, "attention_hidden_size", None) or config.hidden_size
    return {"num_hidden_layers": layers, "hidden_size": hidden, "num_key_value_heads": heads}


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model for an adapter: its shape, and a sample of its final norm's weight.

    Norm weights survive casting and quantised files nearly unchanged and differ between models. Raises
    UnsupportedModelError where there are none yet.
    """
    model = joined(model)
    norm = final_norm(model)
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.is_meta:  # accelerate knows where it lies
        known = (getattr(hook, "weights_map", None) for hook in hooks_of(norm))
        weight = next((weights["weight"] for weights in known if weights is not None), weight)
    if weight is None:  # a norm without weights, or none: what all embeddings have in common identifies a model too
        embeddings: Any = model.get_input_embeddings()
        weight = embeddings.weight.detach().float().mean(0)
    if weight.is_meta:
        raise UnsupportedModelError(
            f"no weight of {type(model).__name__} is in memory that tells whether an adapter is of this model; load "
            "its weights first, or attach it without"
        )
    return fingerprint_of(model.config, weight)


def fingerprint_of(config: Any, norm: Tensor) -> dict[str, Any]:
    """`fingerprint` of a model that is not in memory: its configuration and its final norm's weight [hidden]."""
    shape = shape_of(config)
    named = {
        "model_type": config.model_type,
        "num_hidden_layers": shape["num_hidden_layers"],
        "hidden_size": shape["hidden_size"],
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": shape["num_key_value_heads"],
        "vocab_size": config.vocab_size,
        "head_dim": head_dim(config),
    }
    at = torch.linspace(0, len(norm) - 1, NORM_SAMPLE, device=norm.device).long()
    return {**named, "norms": [round(x, 4) for x in norm.detach()[at].float().tolist()]}
