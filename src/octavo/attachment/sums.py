"""Sums that wait for the norm that reads them, so that one kernel makes both.

A layer adds what its attention and its MLP make to what it was given, and a norm reads the sum next. Each addition is a
kernel of its own, which in a step of few sequences takes longer to start and to end than to add. Here a layer's output
projection and its MLP return a `Sum` of one term, the model's own addition makes one of two, and the norm of compiled
code computes sum and norm together. Whatever else reads a `Sum` finds it computed, as any tensor; one whose terms were
changed in place while it waited raises RuntimeError, and the model runs without a graph.
"""

import copy
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only


class Sum(Tensor):
    """A tensor [...] that is the sum of one or two others of its shape, computed when it is first needed."""

    _terms: tuple[Tensor, ...]
    _versions: list[int]

    @staticmethod
    def __new__(cls, *terms: Tensor) -> "Sum":
        first = terms[0]
        made: Sum = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)
        made._set(*terms)
        return made

    def _set(self, *terms: Tensor) -> None:
        self._terms, self._versions = terms, [each._version for each in terms]

    @property
    def _waits(self) -> bool:
        """Whether there is something left to add. Raises RuntimeError where that is not what it was any more."""
        if len(self._terms) > 1 and [each._version for each in self._terms] != self._versions:
            raise RuntimeError("what a layer adds was changed in place before it was read")
        return len(self._terms) > 1

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.add.Tensor and not kwargs and _alike(*args):
            return cls(*map(computed, args))
        args, kwargs = tree_map_only(cls, computed, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func._schema.is_mutable:  # PyTorch counts changes above this place alone
            increment_version([each for each in args if isinstance(each, Tensor)])
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        """For kernels, which read memory without asking PyTorch."""
        return computed(self).data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(computed(self), memo)


def computed(x: Tensor) -> Tensor:
    """What x stands for, if it is a `Sum`, computed now if it was not; else x."""
    if not isinstance(x, Sum):
        return x
    if x._waits:
        x._set(x._terms[0] + x._terms[1])
    return x._terms[0]


def called(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module's forward returns where sums that it is given are computed before."""
    return forward(*map(computed, args), **{name: computed(value) for name, value in kwargs.items()})


def waiting(out: Any) -> Any:
    """What a module's forward returns, as a sum that more can be added to."""
    return Sum(out) if type(out) is Tensor and out.is_contiguous() else out


@functools.cache  # a function for each class of norms, of which there is one compilation
def with_sum(norm: Callable[..., Tensor]) -> Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of a norm's forward what computes (a + b, its norm) from a module and two terms a and b [..., hidden]."""

    def both(module: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, norm(module, total)

    # Code of its own for each norm: PyTorch counts compilations by code, and gives up after some.
    return FunctionType(both.__code__.replace(), both.__globals__, both.__name__, None, both.__closure__)


def normed(plain: Callable[..., Any], both: Callable[..., tuple[Tensor, Tensor]], *args: Any, **kwargs: Any) -> Any:
    """A norm by `plain`, or by `both` where all that it is given is a sum that waits for it."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Sum) and args[0]._waits:
        total, out = both(*args[0]._terms)
        args[0]._set(total)
        return out
    return called(plain, *args, **kwargs)


def _alike(*terms: Any) -> bool:
    """Whether both are tensors of one shape and dtype."""
    if len(terms) != 2 or not all(isinstance(each, Tensor) for each in terms):
        return False
    a, b = terms
    return a.shape == b.shape and a.dtype == b.dtype and computed(a).is_contiguous() and computed(b).is_contiguous()
