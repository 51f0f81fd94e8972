"""Small pieces of a model's layers as `torch.compile` makes them: in decode steps from CUDA graphs, and in prompts.

Transformers computes a norm in seven operations and a rotary embedding in ten. In a graph each of them costs about two
microseconds, which for few sequences is longer than reading a layer's weights; in a prompt each reads and writes all of
its tokens. Compiled, a norm is one kernel, and so is a rotary embedding or the activation of an MLP. The model itself
stays what it is outside of these forwards, and for other threads within their time.

A layer's queries, keys and values are one product in these forwards, and so are the halves of a gated MLP, see
`octavo.attachment.projections`. Save a model whose weights lie in blocks with `save_pretrained`: `save_model` of
Accelerate leaves out all but the first weight of a block, with a warning.

Compiled code rounds intermediate results of bfloat16 less often than the original, so logits differ in their last bits.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from octavo.attachment.projections import computed_once, gated_as_one, shared_products, watched
from octavo.attachment.sums import called, normed, waiting, with_sum

ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every model that has one
NORM = "Norm"
PIECES = (NORM, "MLP")  # how the classes end whose modules are compiled
OUTPUT = "o_proj"  # what transformers calls attention's last projection in nearly every model
CHOOSING = ("Experts", "Router")  # and of modules in them that do something else with each token; these are left out
TOGETHER = {"combo_kernels": True}  # what Inductor is asked for
COMPILATIONS = 64  # of one function, for sizes and dtypes; PyTorch gives up after eight otherwise

_Place = tuple[dict[str, Any], str]  # where a function is looked up: a module's own names, or a Python module's
_inside: ContextVar[bool] = ContextVar("octavo_compiled", default=False)  # whether this thread runs compiled pieces
_sums: ContextVar[bool] = ContextVar("octavo_sums", default=False)  # and whether additions wait for norms in it
_patching = threading.Lock()  # for the few moments in which functions are replaced
_replaced: dict[tuple[int, str], tuple[set[int], dict[str, Any], Any]] = {}  # by place: which blocks, names, original
_NOTHING = object()


@contextmanager
def compiled(
    base: nn.Module, attention: Sequence[nn.Module], *, lengths_vary: bool = False, sums: bool = False
) -> Iterator[None]:
    """Let the norms and MLPs of a decoder and the rotary function of its attention run compiled inside the block.

    `lengths_vary`: compile once for all numbers of tokens, rather than first for the one that comes. `sums`: compute
    what layers add together with the norm that reads it (`octavo.attachment.sums`); what the decoder returns may be a
    `Sum` then.
    """
    entered: list[_Place] = []
    before = _inside.get(), _sums.get()
    try:
        _inside.set(True)
        _sums.set(sums)
        with _patching:
            for place, own, made in list(_places(base, attention, True if lengths_vary else None)):
                _put(place, functools.partial(_either, own, made), entered)
        with torch._dynamo.config.patch(recompile_limit=max(COMPILATIONS, torch._dynamo.config.recompile_limit)):
            yield
    finally:
        try:
            _take_back(entered)
        except BaseException:  # an interrupt now must not leave the rest where it is
            _take_back(entered)
            raise
        finally:
            _inside.set(before[0])
            _sums.set(before[1])


def _places(
    base: nn.Module, attention: Sequence[nn.Module], dynamic: bool | None
) -> Iterator[tuple[_Place, Callable[..., Any], Callable[..., Any]]]:
    """(place, what the model has there, what is put there) of each piece."""
    for module in base.modules():
        if _is_piece(module):
            made: Callable[..., Any] = functools.partial(_compiled(type(module).forward, dynamic), gated_as_one(module))
            if type(module).__name__.endswith(NORM):
                both = _compiled(with_sum(type(module).forward), dynamic)
                made = functools.partial(normed, made, functools.partial(both, module))
            else:
                made = functools.partial(_waiting, made)
            yield (module.__dict__, "forward"), _bound(module), made
    for module, taken in shared_products(attention, _other_forward):
        yield (module.__dict__, "forward"), _bound(module), taken
    for out in (getattr(module, OUTPUT, None) for module in attention):
        if type(out) is nn.Linear and not watched(out) and not _other_forward(out):
            yield (out.__dict__, "forward"), _bound(out), functools.partial(_waiting, _bound(out))
    seen: set[int] = set()
    for module in attention:
        names = getattr(type(module).forward, "__globals__", {})
        if ROTARY in names and id(names) not in seen:
            seen.add(id(names))
            used = _replaced.get((id(names), ROTARY))
            rotary = names[ROTARY] if used is None else used[2]
            yield (names, ROTARY), rotary, _compiled(rotary, dynamic)


def _bound(module: nn.Module) -> Callable[..., Any]:
    """A module's forward as its class has it."""
    return functools.partial(type(module).forward, module)


def _is_piece(module: nn.Module) -> bool:
    """A norm or MLP that runs as its class says: nobody has replaced a forward in it, and no hook watches it.

    The hooks of its own modules count, since compiled code does not look for them anew in each module that it serves.
    """
    if not type(module).__name__.endswith(PIECES) or any(type(m).__name__.endswith(CHOOSING) for m in module.modules()):
        return False
    return not any(watched(m) or _other_forward(m) for m in module.modules())


def _other_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ and (id(module.__dict__), "forward") not in _replaced


def _put(place: _Place, new: Any, entered: list[_Place]) -> None:
    """Put something in a place, where no other block has done so; `entered`, which stands for a block, gets the place.

    In an order in which an interrupt leaves nothing that `_take_back` would not find.
    """
    names, name = place
    entered.append(place)
    blocks, _, _ = _replaced.setdefault((id(names), name), (set(), names, names.get(name, _NOTHING)))
    if not blocks:
        names[name] = new
    blocks.add(id(entered))


def _take_back(entered: list[_Place]) -> None:
    """Put back what was in a block's places, where no other block needs them any more; it may be done again."""
    with _patching:
        for names, name in entered:
            if (id(names), name) not in _replaced:  # done already, or interrupted before it was put there
                continue
            blocks, _, original = _replaced[id(names), name]
            blocks.discard(id(entered))
            if blocks:
                continue
            if original is _NOTHING:
                names.pop(name, None)
            else:
                names[name] = original
            del _replaced[id(names), name]


def _either(original: Callable[..., Any], made: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The compiled function in a thread that asked for it, the model's own in others."""
    return (made if _inside.get() else original)(*args, **kwargs)


def _waiting(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a forward returns; as a sum that can wait, in a thread that asked for that."""
    out = called(forward, *args, **kwargs)
    return waiting(out) if _sums.get() else out


@functools.cache
def _compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    """One compilation serves all modules of a class, since parameters are its inputs."""
    made: Callable[..., Any] = torch.compile(function, dynamic=dynamic, backend=_inductor)
    return made


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The compiler that `torch.compile` uses when none is named, without products that are computed twice, and with one
    kernel for what it would do in several side by side (queries and keys of a rotary embedding)."""
    made: Callable[..., Any] = torch._inductor.compile(computed_once(graph), inputs, options=TOGETHER)
    return made
