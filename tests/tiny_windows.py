"""Tiny random models of the families whose layers have windows, softcapping or sinks."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from tiny import SHAPE

WINDOW = 12
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
MIXED: dict[str, Any] = {**SHAPE, "sliding_window": WINDOW, "layer_types": ALTERNATING, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED = {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mixtral": lambda: MixtralConfig(**SHAPE, **EXPERTS, sliding_window=WINDOW),
    "starcoder2": lambda: Starcoder2Config(**SHAPE, sliding_window=WINDOW),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SHAPE, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**MIXED, use_sliding_window=True),
    "gemma2": lambda: Gemma2Config(**MIXED, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**MIXED, query_pre_attn_scalar=16),
    "cohere2": lambda: Cohere2Config(**MIXED),
    "olmo3": lambda: Olmo3Config(**MIXED),
    "exaone4": lambda: Exaone4Config(**MIXED),
    "gpt-oss": lambda: GptOssConfig(**MIXED, **EXPERTS),
}


def windowed_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = WINDOWED[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # larger weights than the default, so that what a window hides matters
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    return model
