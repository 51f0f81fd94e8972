"""Faster training on CUDA: norms and MLPs compiled for the time of a run, since their many small operators cost more
than the matrix products of a small model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """Compile the norms and MLPs of a model's decoder in place, on CUDA only, and undo it at the end."""
    modules = _small_operators(model) if model.device.type == "cuda" else []
    # Shapes and gradient modes differ between teacher and student, and each is compiled once for all layers.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(64, limit)
    for module in modules:
        module.compile(dynamic=False)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch._dynamo.config.recompile_limit = limit


def _small_operators(model: PreTrainedModel) -> list[nn.Module]:
    base: Any = model.base_model
    names = ("input_layernorm", "post_attention_layernorm", "mlp")
    found = [getattr(layer, name, None) for layer in base.layers for name in names]
    return [m for m in [*found, getattr(base, "norm", None)] if m is not None]
