"""Products of one input as one product: their weights lie one behind the other, so that a GPU reads them at once.

These are a layer's queries, keys and values, and the two halves of a gated MLP. A step of few sequences reads each
matrix once and computes little, and a kernel takes some microseconds to start and to end, longer than a small matrix
takes to read. The weights stay the model's own parameters, each a part of one block of memory; nothing is held twice.
Weights that lie in memory of somebody else (an optimiser's flat buffer, memory that processes share) stay there, since
its owner changes them there.
"""

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

NAMES = ("q_proj", "k_proj", "v_proj")  # what transformers calls them, in the order in which they are called
GATED = ("gate_proj", "up_proj")  # the same of an MLP; there is no order in which compiled code calls them
# Weights that were laid together, each with the address of its block and references to all that were laid there.
_laid: Any = WeakIdKeyDictionary()
WRITING = {operator.setitem, *(getattr(operator, name) for name in vars(operator) if name.startswith("__i"))}
WRITING -= {operator.__index__, operator.__inv__, operator.__invert__}


class _Product:
    """The three products of one input: the first call makes them, the others take theirs."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = modules
        self.held: tuple[Tensor, Sequence[Tensor]] | None = None  # an input and its products; replaced as a whole

    def take(self, which: int, x: Tensor) -> Tensor:
        """What module number `which` makes of x [..., hidden]."""
        held = (x, self._all(x)) if which == 0 else self.held
        if held is None or held[0] is not x:  # called alone, in another order, or another thread came between
            return F.linear(x, self.modules[which].weight, self.modules[which].bias)
        self.held = None if which == len(self.modules) - 1 else held  # else they would be kept alive
        return held[1][which]

    def _all(self, x: Tensor) -> Sequence[Tensor]:
        made = F.linear(x, _whole([m.weight for m in self.modules]), _joined(self.modules))
        return torch.split(made, [len(m.weight) for m in self.modules], -1)


def shared_products(
    attention: Sequence[nn.Module], replaced: Callable[[nn.Module], bool]
) -> Iterator[tuple[nn.Linear, Callable[..., Any]]]:
    """(module, what to run in place of its forward) of all projections that can share a product.

    Their weights are laid one behind the other first, where they are not. `replaced`: whether somebody has put another
    forward into a module.
    """
    for module in attention:
        modules = _together(module, NAMES, replaced)
        if not modules:
            continue
        product = _Product(modules)
        for which, each in enumerate(modules):
            yield each, functools.partial(product.take, which)


def _together(owner: nn.Module, names: Sequence[str], replaced: Callable[[nn.Module], bool]) -> list[nn.Linear]:
    """The projections that a module has by these names, whose weights lie one behind the other now; none where they
    cannot, or where one of them is missing."""
    parts = [getattr(owner, name, None) for name in names]
    modules = [part for part in parts if type(part) is nn.Linear and _plain(part) and not replaced(part)]
    fit = len(modules) == len(parts) and _alike(modules) and _lay([m.weight for m in modules])
    return modules if fit else []


class _Part(nn.Linear):
    """One of several products of an input, as a part of the product with all of their weights.

    It has its module's own weight and bias too, since some MLPs ask for a weight's dtype.
    """

    whole: Tensor
    whole_bias: Tensor | None
    begin: int

    def __init__(self, module: nn.Linear, whole: Tensor, bias: Tensor | None, begin: int) -> None:
        # All at once: each prompt makes these anew for every layer, and a module is slow to take attributes one by one.
        self.__dict__.update(module.__dict__, whole=whole, whole_bias=bias, begin=begin)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole, self.whole_bias)[..., self.begin : self.begin + self.out_features]


def gated_as_one(mlp: nn.Module) -> nn.Module:
    """What stands for a gated MLP in compiled code: a copy with two equal products; `computed_once` leaves one.

    It is the MLP itself where there are no such weights, or where they cannot be laid one behind the other. Biases are
    laid so too: a CUDA graph reads them long after the stand-in is gone.
    """
    modules = _together(mlp, GATED, lambda module: False)  # which whoever compiles an MLP has looked at
    biases = [m.bias for m in modules if m.bias is not None]
    movable = all(map(_own, biases)) and len({b.dtype for b in biases}) <= 1
    if not modules or not movable or (biases and not _lay(biases)):
        return mlp
    whole, bias = _whole([m.weight for m in modules]).detach(), _whole(biases).detach() if biases else None
    made, begin = copy.copy(mlp), 0
    made.__dict__.pop("forward", None)  # which may be what somebody else compiles now
    made._modules = dict(mlp._modules)
    for name, module in zip(GATED, modules, strict=True):
        made._modules[name] = _Part(module, whole, bias, begin)
        begin += len(module.weight)
    return made


def computed_once(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let all products of one input and one weight in a graph be one product.

    A graph that changes anything in place stays as it is: it may be an input between two products, or one of them.
    """
    if any(map(_writes, module.graph.nodes)):
        return module
    seen: dict[Any, torch.fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.target is not F.linear:
            continue
        first = seen.setdefault((node.args, tuple(node.kwargs.items())), node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    module.recompile()
    return module


def _writes(node: torch.fx.Node) -> bool:
    """Whether a call may change a tensor in place, as far as its name and arguments tell."""
    if not node.op.startswith("call"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    told = node.kwargs.get("inplace") or node.kwargs.get("out") is not None or any(a is True for a in node.args)
    return bool(told) or node.target in WRITING or (name.endswith("_") and not name.endswith("__"))


def _joined(modules: Sequence[nn.Linear]) -> Tensor | None:
    """Their biases one behind the other."""
    biases: list[Tensor] = [m.bias for m in modules if m.bias is not None]
    return torch.cat(biases) if biases else None


def _plain(module: nn.Linear) -> bool:
    """Whether nobody watches a module, and its weight is a matrix in memory."""
    return not watched(module) and _own(module.weight)


def watched(module: nn.Module) -> bool:
    """Whether hooks look at what a module is given or returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _own(weight: Tensor) -> bool:
    """Whether it is a parameter in memory that can be moved."""
    return type(weight) is nn.Parameter and weight.is_contiguous() and not weight.is_inference()


def _alike(modules: Sequence[nn.Linear]) -> bool:
    """Whether their weights are different ones, of one dtype and device, for one input, all with a bias or none."""
    weights = [m.weight for m in modules]
    kinds = {(w.dtype, w.device, w.shape[1], m.bias is None) for w, m in zip(weights, modules, strict=True)}
    return len(kinds) == 1 and len({id(w) for w in weights}) == len(weights)


@torch.inference_mode(False)  # or nothing could be trained after an answer that was asked for in inference mode
@torch.no_grad()
def _lay(weights: Sequence[Tensor]) -> bool:
    """Move weights [n, hidden], or biases [n], into one block of memory, one behind the other, where they are not;
    whether they are."""
    at, together = weights[0].data_ptr(), True
    storage = weights[0].untyped_storage().data_ptr()
    for weight in weights:
        together = together and weight.data_ptr() == at and weight.untyped_storage().data_ptr() == storage
        at += weight.nbytes
    if together:
        return True
    if not all(_alone(weight, weights) for weight in weights):
        return False
    block = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, torch.split(block, [len(w) for w in weights]), strict=True):
        weight.data = part
        _laid[weight] = block.data_ptr(), [weakref.ref(each) for each in weights]
    return True


def _alone(weight: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether nobody but some weights has a part in the memory of one of them, as far as that memory tells."""
    storage = weight.untyped_storage()
    if weight.is_cpu and weight.is_shared():  # type: ignore[no-untyped-call]  # torch calls all memory of a GPU so
        return False
    address, among = _laid.get(weight, (None, []))
    if storage.nbytes() == weight.nbytes or address != storage.data_ptr():
        return storage.nbytes() == weight.nbytes
    # A weight that several layers share would be taken from one of them to the next in every forward.
    others = [each for each in (ref() for ref in among) if each is not None and all(each is not w for w in weights)]
    return all(each.untyped_storage().data_ptr() != address for each in others)


def _whole(weights: Sequence[Tensor]) -> Tensor:
    """All of the block in which the weights, or biases, lie."""
    first = weights[0]
    return first.as_strided((sum(len(w) for w in weights), *first.shape[1:]), (*first.shape[1:], 1))
