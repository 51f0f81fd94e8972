"""Where a model has its attention, its keys and its norm: what Octavo must know of it, from names and a trial."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from octavo.attention import Lifetime
from octavo.errors import UnsupportedModelError

NUMBER = "_octavo_number"  # what an attached model's attention modules know of themselves
_NORMS = (  # what models call the norm before their output layer
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm", "final_norm", "layer_norm",
    "norm_out",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One decoder as Octavo sees it.

    A KV layer is a set of keys and values: most layers of a model store one, some read an earlier layer's, some have a
    state of their own instead. `stores` are the numbers of the layers that store one, in order.
    """

    attention: tuple[nn.Module, ...]  # one per layer that attends, in order
    reads: tuple[int, ...]  # which KV layer each of them attends to
    owns: tuple[bool, ...]  # whether it is the one that stores it
    last: tuple[bool, ...]  # whether nothing after it reads it
    stores: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]  # of each KV layer: heads, elements of a key, elements of a value
    lifetimes: tuple[Lifetime | None, ...]  # of each KV layer
    scored: bool  # scores are more than products
    states: bool  # some layers have a state of their own, which goes from token to token
    continues: bool  # whether several tokens at once can go on from such a state
    keywords: bool  # whether what the decoder is called with reaches its attention
    runs_on: torch.device | None = None  # where accelerate brings weights that lie elsewhere; None: they lie there

    @property
    def kv_heads(self) -> int:
        """Heads of a KV layer, the most where they differ; pages have as many for each, of which some hold nothing."""
        return max(heads for heads, _, _ in self.shapes)

    @property
    def head_dim(self) -> int:
        """Elements of a key or value, the most where they differ; others are filled up with zeros."""
        return max(max(key, value) for _, key, value in self.shapes)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of each KV layer; empty where all have as many."""
        heads = tuple(heads for heads, _, _ in self.shapes)
        return heads if len(set(heads)) > 1 else ()

    @property
    def windowed(self) -> bool:
        """Whether tokens of any layer expire by themselves."""
        return any(life is not None for life in self.lifetimes)

    @property
    def own(self) -> list[nn.Module]:
        """The attention modules that store keys: what gates read is what these are called with."""
        return [module for module, owns in zip(self.attention, self.owns, strict=True) if owns]

    def number(self) -> None:
        """Tell each attention module which of them it is; not all know their layer's number."""
        for i, module in enumerate(self.attention):
            module.__dict__[NUMBER] = i

    def forget(self) -> None:
        """Undo `number`."""
        for module in self.attention:
            module.__dict__.pop(NUMBER, None)


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, whose layers are in it, or what `torch.compile` made, or itself.

    Raises UnsupportedModelError for anything else, and for prompts and prefixes that such a model learns: it hands the
    prefixes over in caches of its own.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        learned = [c for c in model.peft_config.values() if getattr(c, "is_prompt_learning", False)]
        if learned:
            raise UnsupportedModelError(
                f"{type(model).__name__} has learned a prompt or prefix ({learned[0].peft_type}), which is not "
                "supported; adapters inside layers, such as LoRA, are"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"expected a transformers model, not {type(model).__name__}")
    return model


def joined(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose forward Octavo joins: the language model inside one of several kinds of input, or itself."""
    model = unwrapped(model)
    inner = getattr(model.base_model, "language_model", None)
    return inner if isinstance(inner, PreTrainedModel) else model


def runs_on(model: nn.Module) -> torch.device | None:
    """The device that accelerate's hooks bring a model's weights to while they are used, None: no weight is offloaded.

    Raises UnsupportedModelError where there are several.
    """
    hooks = [hook for module in model.modules() for hook in hooks_of(module) if getattr(hook, "offload", False)]
    devices = {torch.device(hook.execution_device) for hook in hooks}
    if len(devices) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} runs on {len(devices)} devices; let it run on one")
    return next(iter(devices), None)


def hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that runs a model's layers, without its output layer.

    Where a class misnames it, that is the one model inside a model with an output layer; some have another around it.
    """
    base: Any = model.base_model
    if base is model and model.get_output_embeddings() is not None:
        inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        base = inner[0] if len(inner) == 1 else base
    decoder = getattr(base, "decoder", None)
    return decoder if isinstance(decoder, PreTrainedModel) else base


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last layer, None where no module is called so."""
    decoder = decoder_of(model)
    found = (getattr(decoder, name, None) for name in _NORMS)
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)
