"""What is made of the masks that transformers wants: padding travels with the forward, and the rest is the rule.

Models of several kinds of input make their language model's masks themselves, one for each kind of layer. What they get
is the padding mask as it was, which the language model's decoder then finds in their place (`padding_of`). In Gemma's
the tokens of a picture see each other in both directions; numbers in the padding mask tell which they are.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from octavo.errors import UnsupportedModelError

_PICTURED = ("gemma3_text", "gemma4_text")  # whose tokens of one picture see each other, in some layers or all
_FIRST = 2  # what the first picture's tokens have in a mask, where padding has 0 and text 1
_DOCUMENTS = "packed_sequence_mask_function"
_WINDOWS = ("sliding_window_overlay", "chunked_overlay")  # functions of transformers that make masks of windows


def mask(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, packed: bool = False, **kwargs: Any
) -> Tensor | None:
    """The mask function beside our attention functions: causality and windows are the rule, the rest is refused.

    `packed`: the running forward knows which documents its tokens belong to, so masks that part them are expressed too.
    Gives the padding mask [B, N] back, which attention leaves aside.
    """
    if mask_function is bidirectional_mask_function:
        raise UnsupportedModelError("it attends in both directions; only causal attention is supported")
    traced = torch.compiler.is_compiling()
    if not traced and getattr(kwargs.get("config"), "model_type", None) in _PICTURED:
        mask_function = _undivided(mask_function)
        pictures = _pictures(mask_function)
        if pictures is not None:
            real = torch.ones_like(pictures) if attention_mask is None else attention_mask
            return torch.where(pictures >= 0, pictures + _FIRST, 1) * real
    if not (_expressed_traced(mask_function, kwargs) if traced else _expressed(mask_function, packed)):
        raise UnsupportedModelError("packed sequences and mask overlays are not supported; pad instead")
    return attention_mask


def padding_of(masks: dict[str, Any]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The padding mask [B, N] in masks that `mask` has made, one for each kind of layer; None: nothing is padded. And
    by kind of layer which picture each token belongs to, [B, N] with -1 for none, where there are pictures.

    Raises UnsupportedModelError for masks that were made otherwise.
    """
    made = {kind: each for kind, each in masks.items() if each is not None}
    if any(not isinstance(each, Tensor) or each.ndim != 2 for each in made.values()):
        raise UnsupportedModelError("masks made beforehand are not supported; pass a 2-D padding mask")
    if not made:
        return None, {}
    numbered = {kind: each for kind, each in made.items() if each.dtype != torch.bool and bool((each >= _FIRST).any())}
    padding = next(iter(made.values()))
    return padding > 0 if numbered else padding, {k: m.where(m >= _FIRST, -1) for k, m in numbered.items()}


def is_windowed(mask_function: Any) -> bool:
    """Whether a window is a part of this."""
    return _maker(mask_function) in _WINDOWS or any(map(is_windowed, _parts(mask_function)))


def _expressed(mask_function: Any, packed: bool) -> bool:
    """Whether this is causality, a window or documents, alone or together: transformers composes masks of closures."""
    maker = _maker(mask_function)
    if packed and maker == "remap_positions_for_packed_sequence":  # the same mask at positions inside documents
        return _expressed(inspect.getclosurevars(mask_function).nonlocals["mask_function"], packed)
    if mask_function is causal_mask_function or maker in _WINDOWS or (packed and maker == _DOCUMENTS):
        return True
    parts = _parts(mask_function)
    return bool(parts) and all(_expressed(part, packed) for part in parts)


def _pictures(mask_function: Any) -> Tensor | None:
    """Which picture each token belongs to, [B, N] with -1 for none, in causality that pictures are let out of, alone or
    within a window; None for another mask."""
    parts = _parts(mask_function)
    if len(parts) == 2 and _maker(parts[1]) in _WINDOWS:
        mask_function = parts[0]
    either = _parts(mask_function, "or_masks")
    if len(either) != 2 or either[0] is not causal_mask_function or _maker(either[1]) != "blockwise_overlay":
        return None
    found: Tensor = inspect.getclosurevars(either[1]).nonlocals["block_sequence_ids"]
    return found.long()


def _undivided(mask_function: Any) -> Any:
    """The mask without documents where each row is one: transformers parts them always while `torch.compile` traces it,
    and what is made then comes here where a graph breaks."""
    documents = [part for part in _parts(mask_function) if _maker(part) == _DOCUMENTS]
    others = [part for part in _parts(mask_function) if _maker(part) != _DOCUMENTS]
    if len(documents) != 1 or len(others) != 1:
        return mask_function
    numbers: Tensor = inspect.getclosurevars(documents[0]).nonlocals["packed_sequence_mask"]
    if bool((numbers != numbers[:, :1]).any()):
        return mask_function
    remapped = _maker(others[0]) == "remap_positions_for_packed_sequence"
    return inspect.getclosurevars(others[0]).nonlocals["mask_function"] if remapped else others[0]


def _maker(mask_function: Any) -> str:
    """The function of transformers that has made a mask."""
    return str(getattr(mask_function, "__qualname__", "")).partition(".")[0]


def _expressed_traced(mask_function: Any, kwargs: dict[str, Any]) -> bool:
    """The same while a forward is traced, where closures hide what they are made of: transformers tells of masks that
    were given to it, joins what blocks see last, and lets masks part documents whether there are several or not."""
    if mask_function is causal_mask_function:
        return True
    return not kwargs.get("use_vmap", True) and mask_function.__code__.co_qualname.startswith("and_masks.")


def _parts(mask_function: Any, maker: str = "and_masks") -> tuple[Any, ...]:
    """The masks that all must agree in one made by `and_masks`, or another `maker`; none where it is not."""
    if _maker(mask_function) != maker:
        return ()
    return tuple(inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ()))
