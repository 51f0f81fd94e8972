"""Sums that wait for the norm that reads them, so that one kernel makes both.

A layer adds what its attention and its MLP make to what it was given, and a norm reads the sum next. Each addition is a
kernel of its own, which in a step of few sequences takes longer to start and to end than to add. Here a layer's output
projection and its MLP return a `Sum` of one term, the model's own addition makes one of two, and the norm of compiled
code computes sum and norm together. Whatever else reads a `Sum` finds it computed, as any tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Sum(Tensor):
    """A tensor [...] that is the sum of one or two others of its shape, computed when it is first needed."""

    _terms: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, *terms: Tensor) -> "Sum":
        first = terms[0]
        made: Sum = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)
        made._terms = terms
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.add.Tensor and not kwargs and _alike(*args):
            return cls(*map(computed, args))
        args, kwargs = tree_map_only(cls, computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def computed(x: Tensor) -> Tensor:
    """What x stands for, if it is a `Sum`, computed now if it was not; else x."""
    if not isinstance(x, Sum):
        return x
    if len(x._terms) > 1:
        x._terms = (x._terms[0] + x._terms[1],)
    return x._terms[0]


def waiting(out: Any) -> Any:
    """What a module's forward returns, as a sum that more can be added to."""
    return Sum(out) if type(out) is Tensor and out.is_contiguous() else out


def with_sum(norm: Callable[..., Tensor]) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of a norm's forward what computes (a + b, its norm) from a module and two terms a and b [..., hidden]."""

    def both(module: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, norm(module, total)

    return both


def normed(
    plain: Callable[..., Any], both: Callable[..., tuple[Tensor, Tensor]], x: Any, *args: Any, **kwargs: Any
) -> Any:
    """The norm of x by `plain`, or by `both` where x is a sum that waits for it and nothing else is given."""
    if not isinstance(x, Sum) or len(x._terms) == 1 or args or kwargs:
        return plain(computed(x), *args, **kwargs)
    total, out = both(*x._terms)
    x._terms = (total,)
    return out


def _alike(*terms: Any) -> bool:
    """Whether both are tensors of one shape and dtype."""
    if len(terms) != 2 or not all(isinstance(each, Tensor) for each in terms):
        return False
    a, b = terms
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and computed(a).is_contiguous()
