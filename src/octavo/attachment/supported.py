"""Which models can be attached: every requirement is checked by name, and a refusal says which one failed."""

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.attention import Lifetime
from octavo.config import NEVER
from octavo.errors import UnsupportedModelError

NORM_SAMPLE = 64  # values of the final norm's weight kept in a fingerprint
_WINDOWS = {  # by kind of layer: the setting that says how long its tokens are visible, None: they always are
    "full_attention": None, "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size",
}  # fmt: skip
_LATENT = ("kv_lora_rank", "q_lora_rank")


def check_supported(model: object) -> None:
    """Raise UnsupportedModelError unless `model` is a decoder whose layers attend to keys by position alone.

    Windows, logit softcapping and sinks are part of it. README says which models are tested; what shares their
    attention interface runs as they do.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"expected a transformers model, not {type(model).__name__}")
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; its cross-attention cache is not supported")
    if any(getattr(config, key, None) for key in _LATENT):
        raise UnsupportedModelError(f"{name} uses latent attention; its cache holds no keys to evict")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{name} attends in both directions; only causal attention is supported")
    lifetimes(model)
    for module in attention_modules(model):
        if hasattr(module, "lambda_init"):
            raise UnsupportedModelError(
                f"{name} has differential attention, which attends twice in a layer; Octavo's attention does so once"
            )
    devices = {p.device for p in model.base_model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"{name} lies on {len(devices)} devices; put it on one")
    _check_passes_on(model)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every decoder layer, in order. Raises UnsupportedModelError where there are none."""
    layers = getattr(model.base_model, "layers", None)
    modules = [getattr(layer, "self_attn", None) for layer in layers] if layers is not None else []
    needed = ("layer_idx", "num_key_value_groups", "head_dim")
    if layers is None and isinstance(getattr(model.base_model, "language_model", None), PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} wraps its decoder in a model of several kinds of input; attach the decoder alone, "
            "as in octavo.attach(model.base_model.language_model), and go on using the whole model"
        )
    if not modules or not all(m is not None and all(hasattr(m, a) for a in needed) for m in modules):
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks decoder layers with a self_attn that has {', '.join(needed)}"
        )
    return [m for m in modules if m is not None]


class _Reached(Exception):
    """Ends the trial of a layer where its attention begins."""


@torch.no_grad()
def _check_passes_on(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where what a forward is told does not reach the attention of its layers.

    Signatures do not tell: layers take keyword arguments that they drop. So the first one is tried, on one token, up to
    its attention.
    """
    base: Any = model.base_model
    layer = base.layers[0]
    for module in (base, layer, layer.self_attn):
        parameters = inspect.signature(type(module).forward).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise UnsupportedModelError(
                f"the forward of {type(module).__name__} takes no further keyword arguments, by which Octavo tells a "
                "model's attention what to attend to"
            )
    reached: list[bool] = []

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append("octavo_trial" in kwargs)
        raise _Reached

    handle = layer.self_attn.register_forward_pre_hook(end, with_kwargs=True, prepend=True)
    try:
        with suppress(Exception):  # _Reached, or what the layer says for lack of something that its decoder gives it
            hidden = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
            position = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            given = {"attention_mask": None, "position_ids": position, "past_key_values": None, "use_cache": False}
            rotary = base.rotary_emb(hidden, position_ids=position)
            type(layer).forward(layer, hidden, **given, position_embeddings=rotary, octavo_trial=True)
    finally:
        handle.remove()
    if reached == [False]:
        raise UnsupportedModelError(
            f"{type(layer).__name__} does not pass keyword arguments on to its attention, by which Octavo tells it "
            "what to attend to"
        )


def lifetimes(model: PreTrainedModel) -> tuple[Lifetime | None, ...]:
    """How long the tokens of each layer are visible, None where it attends to everything.

    A window at or past the model's positions is none. Raises UnsupportedModelError for layers of another kind.
    """
    config: Any = model.config
    name, most = type(model).__name__, getattr(config, "max_position_embeddings", None) or NEVER
    kinds, count = getattr(config, "layer_types", None), len(attention_modules(model))
    if not kinds:
        slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * count
    if len(kinds) < count or (others := sorted({str(k) for k in kinds} - set(_WINDOWS))):
        what = ", ".join(others) if len(kinds) >= count else f"only {len(kinds)}"
        raise UnsupportedModelError(f"{name} has {what} layer types; {', '.join(_WINDOWS)} are supported")
    out: list[Lifetime | None] = []
    for kind in kinds[:count]:
        setting = _WINDOWS[kind]
        length = getattr(config, setting, None) if setting else None
        if setting and not length:
            raise UnsupportedModelError(f"{name} has layers of {kind} and sets no {setting}")
        out.append(Lifetime(int(length), kind == "chunked_attention") if length and length < most else None)
    return tuple(out)


def scores_alone(model: PreTrainedModel) -> bool:
    """Whether scores are products of queries and keys and nothing more: no softcapping, no sinks."""
    sinks = any(getattr(module, "sinks", None) is not None for module in attention_modules(model))
    return not sinks and not getattr(model.config, "attn_logit_softcapping", None)


def rope_sees_length(config: Any) -> bool:
    """Whether RoPE's frequencies depend on how long the input of a forward is, as in longrope."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(one.get("rope_type", one.get("type")) in ("longrope", "dynamic") for one in each)


def head_dim(config: Any) -> int:
    """Elements of one key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model for an adapter: its shape, and a sample of its final norm's weight.

    Norm weights survive casting and quantised files nearly unchanged and differ between models.
    """
    norm = getattr(model.base_model, "norm", None)
    weight = getattr(norm, "weight", None)
    if weight is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no final norm to identify it by")
    return fingerprint_of(model.config, weight)


def fingerprint_of(config: Any, norm: Tensor) -> dict[str, Any]:
    """`fingerprint` of a model that is not in memory: its configuration and its final norm's weight [hidden]."""
    keys = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    at = torch.linspace(0, len(norm) - 1, NORM_SAMPLE, device=norm.device).long()
    sample = [round(x, 4) for x in norm.detach()[at].float().tolist()]
    return {**{k: getattr(config, k) for k in keys}, "head_dim": head_dim(config), "norms": sample}
