"""Small pieces of a model's layers as `torch.compile` makes them, for the time in which a CUDA graph is captured.

Transformers computes a norm in seven operations and a rotary embedding in ten. In a graph each of them costs about two
microseconds, which for few sequences is longer than reading a layer's weights. Compiled, a norm is one kernel, and so
is a rotary embedding or the activation of an MLP. The model itself stays what it is outside of graphs.

Compiled code rounds intermediate results of bfloat16 less often than the original, so logits differ in their last bits.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every model that has one
PIECES = ("Norm", "MLP")  # how the classes end whose modules are compiled
_patching = threading.Lock()  # the rotary function belongs to a module that several models share


@contextmanager
def compiled(base: nn.Module, attention: Sequence[nn.Module]) -> Iterator[None]:
    """Let the norms and MLPs of a decoder and the rotary function of its attention run compiled inside the block."""
    namespaces: dict[int, dict[str, Any]] = {}
    for module in attention:
        names = getattr(type(module).forward, "__globals__", {})
        if ROTARY in names:
            namespaces[id(names)] = names
    with _patching:
        modules = [m for m in base.modules() if _is_piece(m)]
        before = [(names, names[ROTARY]) for names in namespaces.values()]
        try:
            for module in modules:
                module.__dict__["forward"] = functools.partial(_compiled(type(module).forward), module)
            for names, rotary in before:
                names[ROTARY] = _compiled(rotary)
            yield
        finally:
            for names, rotary in before:
                names[ROTARY] = rotary
            for module in modules:
                module.__dict__.pop("forward", None)


def _is_piece(module: nn.Module) -> bool:
    """A norm or MLP that runs as its class says: nobody has replaced a forward in it, and no hook watches it.

    The hooks of its own modules count, since compiled code does not look for them anew in each module that it serves.
    """
    if not type(module).__name__.endswith(PIECES):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in module.modules())


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compilation serves all modules of a class, since parameters are its inputs."""
    compiled_function: Callable[..., Any] = torch.compile(function)
    return compiled_function
