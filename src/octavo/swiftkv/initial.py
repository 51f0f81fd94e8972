"""Which models can be transformed, and the weights that training starts from."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.swiftkv.transform import SwiftKV, SwiftSpec, has_rotary

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "granite", "smollm3")


def spec_for(model: PreTrainedModel, kv_layers: int, group: int = 1, before: int = 0) -> SwiftSpec:
    """The transform's shape for a model. Raises UnsupportedModelError and ConfigError."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"SwiftKV is made for {', '.join(MODEL_TYPES)} models, not for {config.model_type} ({type(model).__name__})"
        )
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    spec = SwiftSpec(
        layers=config.num_hidden_layers,
        kv_layers=kv_layers,
        group=group,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        bias=projections(attention)[0][1] is not None,
        eps=config.rms_norm_eps,
        before=before,
    )
    for first in range(kv_layers, spec.layers, group):
        if len({has_rotary(layer.self_attn) for layer in base.layers[first : first + group]}) > 1:
            raise ConfigError(
                f"layers {first} to {first + group - 1} would share keys, but some of them have rotary positions and "
                "some have none; choose a group of 1, or one that keeps them apart"
            )
    return spec


def projections(attention: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """(weight [out, hidden], bias [out] or None) of an attention module's queries, keys and values.

    Phi-3 has all three in one product, whose parts are views of it.
    """
    module: Any = attention
    if not hasattr(module, "qkv_proj"):
        return [(p.weight, p.bias) for p in (module.q_proj, module.k_proj, module.v_proj)]
    config, fused = module.config, module.qkv_proj
    keys = config.num_key_value_heads * module.head_dim
    sizes = [config.num_attention_heads * module.head_dim, keys, keys]
    biases = [None] * 3 if fused.bias is None else fused.bias.split(sizes)
    return list(zip(fused.weight.split(sizes), biases, strict=True))


@torch.no_grad()
def initial(model: PreTrainedModel, kv_layers: int, group: int = 1, before: int = 0) -> SwiftKV:
    """The published recipe's start: the norm of layer K, each layer's queries, keys and values averaged per group.

    `kv_layers` is K. With `before`, what tokens hand on is a random projection of n, of which nothing is made at first.
    The weights are float32, on the model's device (arXiv 2410.03960).
    Raises UnsupportedModelError and ConfigError.
    """
    spec = spec_for(model, kv_layers, group, before)
    transform = SwiftKV(spec).to(model.device)
    layers: Any = model.base_model.layers
    upper = [projections(layer.self_attn) for layer in layers[kv_layers:]]
    transform.norm.copy_(layers[kv_layers].input_layernorm.weight)
    if transform.hand is not None:
        drawn = torch.randn(transform.hand.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        transform.hand.copy_(drawn * spec.hidden**-0.5)
    for i, (query, _, _) in enumerate(upper):
        transform.q[i].copy_(query[0])
        if transform.q_bias is not None and query[1] is not None:
            transform.q_bias[i].copy_(query[1])
    for which in (0, 1):  # keys, then values
        made = [layer[1 + which] for layer in upper]
        weights = torch.stack([weight.float() for weight, _ in made])  # [upper, out, hidden]
        transform.kv[which].copy_(weights.view(spec.groups, group, *weights.shape[1:]).mean(1))
        if transform.kv_bias is not None:
            biases = torch.stack([bias.float() for _, bias in made if bias is not None])
            transform.kv_bias[which].copy_(biases.view(spec.groups, group, -1).mean(1))
    return transform
