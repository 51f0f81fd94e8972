"""One forward of a few tokens on the model itself, before it is attached: what its attention does, and what it needs.

Signatures and configurations do not tell whether a model's attention goes through transformers' interface, once in each
layer, over the keys that its cache has got, and whether keyword arguments reach it. A trial does, at the price of one
pass over the weights, and refuses a model before any work is done with it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from octavo.attachment.layout import decoder_of
from octavo.attachment.masks import is_windowed, mask
from octavo.attention import Scoring, dense_attention
from octavo.errors import UnsupportedModelError

NAME = "octavo-trial"
TOKENS = (1, 2, 3)
KNOWN = {  # what attention functions are told that changes nothing here, or that the visibility rule says
    "cache_params", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "labels", "logits_to_keep",
    "max_length_k", "max_length_q", "mm_token_type_ids", "token_type_ids",
    "octavo_trial", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "s_aux", "sliding_window", "softcap", "use_cache",
}  # fmt: skip


class Call(NamedTuple):
    """One call of the attention function."""

    module: nn.Module
    kv_layer: int  # whose keys it reads, in the order in which they came
    query_heads: int
    scored: bool
    keywords: bool  # whether the decoder's keyword argument came with it


class Stored(NamedTuple):
    """The keys and values [1, H, 3, D] that one layer gave to the cache."""

    layer: int
    key: Tensor
    value: Tensor


class Trial(DynamicCache):  # type: ignore[misc]
    """The cache of a trial: it notes what comes in, and what attention is called with."""

    def __init__(self, config: Any, keyword: bool) -> None:
        try:
            super().__init__(config=config)
        except Exception as e:
            raise UnsupportedModelError(
                f"transformers has no cache for layers of its kind ({type(e).__name__}: {e})"
            ) from e
        self.stored: list[Stored] = []
        self.calls: list[Call] = []
        self.keyword = keyword
        self.reached = False  # whether the decoder's own forward was called
        self.windows = False  # whether any mask was of a window
        self.hidden: dict[nn.Module, Any] = {}  # what modules with a layer's number are called with

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Note a layer's keys and values, and give them back as the same objects, by which attention is known."""
        if layer_idx in (s.layer for s in self.stored):
            raise UnsupportedModelError(f"layer {layer_idx} has more than one set of keys")
        self.stored.append(Stored(layer_idx, key_states, value_states))
        return key_states, value_states

    def update_indexer(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: an indexer chooses what each query sees, which the visibility rule cannot."""
        raise UnsupportedModelError("an indexer chooses the tokens that each query attends to")

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook on attention modules: note the hidden states that they are called with."""
        self.hidden[module] = args[0] if args else kwargs.get("hidden_states")

    def reach(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook on the decoder: give it a keyword argument that should come to its attention."""
        self.reached = True
        parameters = inspect.signature(type(module).forward).parameters.values()
        takes = self.keyword and any(p.kind is p.VAR_KEYWORD for p in parameters)
        return (args, {**kwargs, "octavo_trial": True}) if takes else None

    def called(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, told: dict[str, Any]) -> None:
        """Note a call of the attention function, or refuse it."""
        name = type(module).__name__
        if any(call.module is module for call in self.calls):
            raise UnsupportedModelError(f"{name} attends more than once, and Octavo keeps one set of keys per layer")
        reads = next((i for i, s in enumerate(self.stored) if s.key is key and s.value is value), None)
        if reads is None:
            raise UnsupportedModelError(f"{name} attends to other keys than those that it gives to the cache")
        hidden = self.hidden.get(module)
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != (1, len(TOKENS)):
            raise UnsupportedModelError(f"{name} is not called with the hidden states of its layer")
        if told.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name} attends in both directions; only causal attention is supported")
        others = sorted(n for n, v in told.items() if v is not None and n not in KNOWN)
        if others:
            raise UnsupportedModelError(f"{name} tells its attention {', '.join(others)}, which Octavo's does not know")
        scored = told.get("softcap") is not None or told.get("s_aux") is not None
        self.calls.append(Call(module, reads, query.shape[1], scored, "octavo_trial" in told))


_RUNNING: ContextVar[Trial | None] = ContextVar("octavo_trial", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function registered with transformers; see `Trial.called`."""
    trial = _RUNNING.get()
    assert trial is not None
    if attention_mask is not None and attention_mask.ndim > 2:
        raise UnsupportedModelError(f"{type(module).__name__} adds a mask or bias of its own to its scores")
    trial.called(module, query, key, value, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scoring = None if softcap is None and sinks is None else Scoring(softcap, sinks)
    return dense_attention(query, key, value, None, 0, scale, scoring=scoring).contiguous(), None


AttentionInterface.register(NAME, _attention)


def _mask(*, mask_function: Any, **kwargs: Any) -> Tensor | None:
    """The mask function beside it."""
    trial = _RUNNING.get()
    assert trial is not None
    trial.windows |= is_windowed(mask_function)
    return mask(mask_function=mask_function, **kwargs)


AttentionMaskInterface.register(NAME, _mask)


@torch.no_grad()
def tried(model: PreTrainedModel, inner: PreTrainedModel, device: torch.device) -> Trial:
    """What a forward of a few tokens on `device` through `model` shows of the language model in it, `inner`, or itself.

    Both are as they were afterwards. Raises UnsupportedModelError, which says why it cannot run.
    """
    decoder, name = decoder_of(inner), type(model).__name__
    if "past_key_values" not in inspect.signature(type(decoder).forward).parameters:
        raise UnsupportedModelError(f"{name} takes no past_key_values, so it has no cache that Octavo could be")
    if not getattr(inner, "_can_set_attn_implementation", lambda: True)():
        raise UnsupportedModelError(f"{name}: its attention does not go through transformers' attention interface")
    try:
        try:
            trial = _run(model, inner, decoder, device, keyword=True)
        except TypeError:  # layers that take no keyword arguments are told by a context variable
            trial = _run(model, inner, decoder, device, keyword=False)
    except UnsupportedModelError as e:
        raise UnsupportedModelError(f"{name}: {e}") from e
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        said = " ".join(str(e).split())
        raise UnsupportedModelError(
            f"{name} fails in a trial of {len(TOKENS)} tokens: {type(e).__name__}: {said}"
        ) from e
    if not trial.calls:
        raise UnsupportedModelError(f"{name}: its attention does not go through transformers' attention interface")
    if not trial.reached:
        raise UnsupportedModelError(f"{name} does not call {type(decoder).__name__}, whose forward Octavo joins")
    return trial


def _run(
    model: PreTrainedModel, inner: PreTrainedModel, decoder: nn.Module, device: torch.device, keyword: bool
) -> Trial:
    """The forward itself; `keyword`: the decoder is given a keyword argument."""
    trial = Trial(inner.config, keyword)
    with _running(inner, decoder, trial):
        ids = torch.tensor([TOKENS], device=device)
        # A language model that is joined gets no mask where nothing else than attention reads it.
        mask = {} if model is inner else {"attention_mask": torch.ones_like(ids)}
        model(input_ids=ids, past_key_values=trial, use_cache=True, **mask)
    return trial


@contextmanager
def _running(model: PreTrainedModel, decoder: nn.Module, trial: Trial) -> Iterator[None]:
    """Let attention go to a trial inside the block, without dropout; afterwards the model is as it was."""
    modes = [(m, m.training) for m in model.modules()]
    before, token = model.config._attn_implementation, _RUNNING.set(trial)
    hooks = [
        m.register_forward_pre_hook(trial.remember, with_kwargs=True, prepend=True)
        for m, _ in modes
        if hasattr(m, "layer_idx") or "Attention" in type(m).__name__
    ]
    hooks.append(decoder.register_forward_pre_hook(trial.reach, with_kwargs=True))
    try:
        for module, _ in modes:
            module.training = False
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        _RUNNING.reset(token)
