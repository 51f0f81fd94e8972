"""Published DMS checkpoints as fields of config.json and tensors by name: NVIDIA's layout, which docs/formats.md tells.

Their gate reads RMSNorm(residual stream before the attention norm) with a weight of its own, ours the output of the
attention norm. Both are the same normalised stream times a weight, so one folds into the other: our weight is theirs
times their norm's weight over the attention norm's.

Where `dms_separate_alpha` is false there is no gate of its own: the value is the last channel of the query of each
group's first query head, after the query norm where there is one and before RoPE; the channel then counts as zero, both
before RoPE and after it. Such gates are `borrowed`: they read these channels, [B, N, kv_heads], in place of a hidden
state, each its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.config import Eviction
from octavo.dms.gate import Gates, GateSpec
from octavo.errors import AdapterFileError, ConfigError

PREFIX = "dms_"
SEPARATE = f"{PREFIX}separate_alpha"
GATE = "dms_proj_alpha"  # in the names of all tensors of gates
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # whose norms are plain RMSNorms, which is what folds
SHIFT = 1  # their decision for token i is read at token i + 1
SMALLEST = 1e-12  # of the attention norm's weights that theirs can be divided by

_DEFAULTS = {  # where a configuration leaves a field out
    f"{PREFIX}alpha_scale": 100.0,
    f"{PREFIX}initial_alpha_offset": 5.0,
    f"{PREFIX}window_size": 512,
    f"{PREFIX}alpha_per": "head",
    f"{PREFIX}disable_eviction": False,
    f"{PREFIX}cr": 8,
}
_OTHERS = {  # of training, and of how their own code runs
    f"{PREFIX}{name}"
    for name in (
        *("tau", "paged_attention_block_size", "compile_limit", "manual_inference_mode", "chunked_prefill"),
        "preallocate_for_tokens",
    )
}


@dataclass(frozen=True)
class Layout:
    """What a published configuration says of its gates; `separate` None: it says nothing, the tensors do."""

    spec: GateSpec  # of gates with weights of their own
    separate: bool | None
    disabled: bool  # nothing is evicted
    target: float


def is_published(settings: dict[str, Any]) -> bool:
    """Whether a config.json is that of a published DMS checkpoint."""
    return any(name.startswith(PREFIX) for name in settings)


def read_layout(settings: dict[str, Any], config: Any, source: object) -> Layout:
    """The fields of a config.json, `config` being the base model's configuration. Raises AdapterFileError."""
    given = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
    unknown = sorted(given.keys() - _DEFAULTS.keys() - _OTHERS - {SEPARATE})
    if unknown:
        raise AdapterFileError(
            f"{source}: config.json has unknown fields, which may mean another rule: {', '.join(unknown)}"
        )
    fields = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    for name, kinds, what in (
        (f"{PREFIX}alpha_scale", (int, float), "a number"),
        (f"{PREFIX}initial_alpha_offset", (int, float), "a number"),
        (f"{PREFIX}window_size", (int,), "a whole number"),
        (f"{PREFIX}alpha_per", (str,), "'head' or 'layer'"),
        (f"{PREFIX}cr", (int, float), "a number"),
        (f"{PREFIX}disable_eviction", (bool,), "true or false"),
        (SEPARATE, (bool, type(None)), "true or false"),
    ):
        if type(fields.get(name)) not in kinds:
            raise AdapterFileError(f"{source}: config.json: {name} must be {what}, not {fields.get(name)!r}")
    try:
        spec = GateSpec(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_heads=config.num_key_value_heads,
            eviction=Eviction(fields[f"{PREFIX}window_size"], SHIFT),
            scale=float(fields[f"{PREFIX}alpha_scale"]),
            offset=float(fields[f"{PREFIX}initial_alpha_offset"]),
            granularity=fields[f"{PREFIX}alpha_per"],
        )
    except ConfigError as e:
        raise AdapterFileError(f"{source}: config.json: {e}") from e
    return Layout(spec, fields.get(SEPARATE), fields[f"{PREFIX}disable_eviction"], float(fields[f"{PREFIX}cr"]))


def gate_tensors(spec: GateSpec, bias: bool) -> dict[str, Tensor]:
    """Tensors to be filled, by their published names: of gates, and of the norms that they are folded with."""
    found = {}
    for layer in range(spec.layers):
        block = f"model.layers.{layer}"
        found[f"{block}.self_attn.{GATE}.weight"] = torch.empty(spec.kv_heads, spec.hidden)
        if bias:
            found[f"{block}.self_attn.{GATE}.bias"] = torch.empty(spec.kv_heads)
        found[f"{block}.self_attn.{GATE}_norm.weight"] = torch.empty(spec.hidden)
        found[f"{block}.input_layernorm.weight"] = torch.empty(spec.hidden)
    return found


def folded_gates(spec: GateSpec, tensors: dict[str, Tensor], source: object) -> Gates:
    """Gates from filled `gate_tensors`. Raises AdapterFileError where a norm cannot be divided by.

    Theirs have an output per KV head also where the first decides for its layer.
    """
    gates = Gates(spec)
    for layer in range(spec.layers):
        block = f"model.layers.{layer}"
        weight = tensors[f"{block}.self_attn.{GATE}.weight"][: spec.outputs]
        theirs, ours = tensors[f"{block}.self_attn.{GATE}_norm.weight"], tensors[f"{block}.input_layernorm.weight"]
        used = (weight * theirs != 0).any(0)
        lost = used & (ours.abs() < SMALLEST)
        if lost.any():
            raise AdapterFileError(
                f"{source}: the gate of layer {layer} reads {int(lost.sum())} channels that its attention norm removes "
                f"({block}.input_layernorm.weight is under {SMALLEST} there); Octavo's gates read that norm's output"
            )
        gates.weight.data[layer] = torch.where(used, weight * (theirs / torch.where(used, ours, 1.0)), 0.0)
        bias = tensors.get(f"{block}.self_attn.{GATE}.bias")
        if bias is not None:
            gates.bias.data[layer] = bias[: spec.outputs]
    return gates


def borrowed_gates(spec: GateSpec) -> Gates:
    """Gates that read the channels that queries lend them, [B, N, kv_heads], each its own."""
    gates = Gates(
        GateSpec(
            spec.layers, spec.kv_heads, spec.kv_heads, spec.eviction, spec.scale, spec.offset, spec.granularity,
            borrowed=True,
        )
    )  # fmt: skip
    gates.weight.data[:] = torch.eye(spec.kv_heads)[: spec.outputs]
    return gates


def published_tensors(gates: Gates, norms: list[Tensor]) -> dict[str, Tensor]:
    """The tensors that `folded_gates` makes these gates from; none for borrowed ones.

    `norms`: the attention norms' weights [hidden] by layer, which theirs are then too. Biases are written where there
    are some: their code reads them where the model's attention has biases.
    """
    spec, state = gates.spec, gates.folded_state()
    if spec.borrowed:
        return {}
    found = {}
    for layer, norm in enumerate(norms):
        name = f"model.layers.{layer}.self_attn.{GATE}"
        removed = norm.detach().float().cpu().abs() < SMALLEST
        found[f"{name}.weight"] = state["weight"][layer].cpu().masked_fill(removed, 0.0).expand(spec.kv_heads, -1)
        found[f"{name}_norm.weight"] = norm.detach().clone()  # files hold no tensor twice
        if state["bias"].any():
            found[f"{name}.bias"] = state["bias"][layer].expand(spec.kv_heads)
    return found


def published_fields(gates: Gates, target: float) -> dict[str, Any]:
    """The fields of config.json that `read_layout` reads these gates' settings from. Raises ConfigError."""
    spec = gates.spec
    if spec.eviction.shift != SHIFT:
        raise ConfigError(
            f"in NVIDIA's layout the mark of token i is read at token i + {SHIFT}, and these gates read it at token i; "
            f"gates must be made with shift {SHIFT} to be written in it"
        )
    block = 256  # what their code takes, and less where it would not: it wants pages smaller than the window
    while block > 1 and block >= spec.eviction.window:
        block //= 2
    return {
        f"{PREFIX}alpha_scale": spec.scale,
        f"{PREFIX}initial_alpha_offset": spec.offset,
        f"{PREFIX}window_size": spec.eviction.window,
        f"{PREFIX}alpha_per": spec.granularity,
        SEPARATE: not spec.borrowed,
        f"{PREFIX}disable_eviction": False,
        f"{PREFIX}cr": target,
        f"{PREFIX}tau": 0.1,
        f"{PREFIX}paged_attention_block_size": block,
    }
