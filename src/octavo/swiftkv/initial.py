"""Which models can be transformed, and the weights that training starts from."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from octavo.errors import UnsupportedModelError
from octavo.swiftkv.transform import SwiftKV, SwiftSpec

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def spec_for(model: PreTrainedModel, kv_layers: int, group: int = 1) -> SwiftSpec:
    """The transform's shape for a model. Raises UnsupportedModelError and ConfigError."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"SwiftKV is made for {', '.join(MODEL_TYPES)} models, not for {config.model_type} ({type(model).__name__})"
        )
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    return SwiftSpec(
        layers=config.num_hidden_layers,
        kv_layers=kv_layers,
        group=group,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        bias=attention.q_proj.bias is not None,
        eps=config.rms_norm_eps,
    )


@torch.no_grad()
def initial(model: PreTrainedModel, kv_layers: int, group: int = 1) -> SwiftKV:
    """The published recipe's start: the norm of layer K, each layer's queries, keys and values averaged per group.

    `kv_layers` is K. The weights are float32, on the model's device (arXiv 2410.03960).
    Raises UnsupportedModelError and ConfigError.
    """
    spec = spec_for(model, kv_layers, group)
    transform = SwiftKV(spec).to(model.device)
    layers: Any = model.base_model.layers
    upper = [layer.self_attn for layer in layers[kv_layers:]]
    transform.norm.copy_(layers[kv_layers].input_layernorm.weight)
    groups = [upper[i : i + group] for i in range(0, spec.upper, group)]
    for i, attention in enumerate(upper):
        transform.q[i].copy_(attention.q_proj.weight)
        if transform.q_bias is not None:
            transform.q_bias[i].copy_(attention.q_proj.bias)
    for which, name in enumerate(("k_proj", "v_proj")):
        for g, members in enumerate(groups):
            projections: list[nn.Linear] = [getattr(module, name) for module in members]
            transform.kv[which, g].copy_(torch.stack([p.weight.float() for p in projections]).mean(0))
            if transform.kv_bias is not None:
                transform.kv_bias[which, g].copy_(torch.stack([p.bias.float() for p in projections]).mean(0))
    return transform
