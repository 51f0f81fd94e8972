"""Tiny models of six layers with random SwiftKV transforms, and gates for them."""

import torch
from transformers import GraniteConfig, Phi3Config, Qwen3MoeConfig, SmolLM3Config

from octavo.attachment.supported import fingerprint
from octavo.config import Eviction
from octavo.dms import Adapter, Gates, GateSpec
from octavo.swiftkv import SwiftKVAdapter, initial
from tiny import FAMILIES, SHAPE, tiny_model

LAYERS = 6
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 24}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0}
SWIFT_FAMILIES = {  # every model type that SwiftKV is made for, each in what is particular to it
    **FAMILIES,
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "phi3": lambda: Phi3Config(**SHAPE, partial_rotary_factor=0.5),  # one product for queries, keys and values
    "granite": lambda: GraniteConfig(**SHAPE, **SCALES),
    "smollm3": lambda: SmolLM3Config(**{**SHAPE, "num_hidden_layers": LAYERS}, no_rope_layers=[1, 1, 1, 1, 0, 0]),
}


def model_of(family="llama", **changes):
    return tiny_model(
        SWIFT_FAMILIES[family], num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS, **changes
    )


def swiftkv_for(model, kv_layers=2, group=1, name="swift", seed=11, before=0):
    """Random weights, far from the base model's; `before`: numbers that tokens hand on."""
    transform = initial(model, kv_layers, group, before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name_, parameter in transform.named_parameters():
            if name_ == "norm":
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.15, generator=generator)
    return SwiftKVAdapter(name, transform, fingerprint(model))


def gates_for(model, transform, window=20, shift=0, rate=0.5):
    made_on = transform.spec
    spec = GateSpec(made_on.cached_layers, made_on.hidden, made_on.kv_heads, Eviction(window, shift))
    gates = Gates(spec)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        gates.weight.normal_(0, 0.1, generator=generator)
        gates.bias.fill_(spec.offset / spec.scale + (rate - 0.5))
    return Adapter("gates", gates, fingerprint(model), 2.0, made_on=transform.fingerprint())


def pair(model, group, evict, before=0, **options):
    swift = swiftkv_for(model, group=group, before=before)
    return [swift, gates_for(model, swift.transform, **options)] if evict else [swift]


def full(model, ids, **kwargs):
    """Logits of one forward without a cache: the full SwiftKV forward, evicted tokens masked."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits
