"""Which calls of `generate` a reuse store can help, and with which prompts."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

_ELSEWHERE = (  # what makes `generate` another method, or asks for more than logits of the prompt
    "assistant_model", "assistant_early_exit", "cache_implementation", "constraints", "custom_generate", "dola_layers",
    "force_words_ids", "negative_prompt_ids", "num_beam_groups", "output_attentions", "output_hidden_states",
    "past_key_values", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens", "speculation_type",
    "token_healing", "use_mtp",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of `generate` that can be helped: its arguments by name, and its prompts without padding."""

    given: dict[str, Any]
    ids: Tensor  # [B, T] int64
    rows: list[list[int]]
    copies: int  # sequences that each prompt becomes: beams, or answers asked for

    @property
    def columns(self) -> int:
        """T, padding included."""
        return int(self.ids.shape[1])


def understood(
    attachment: "Attachment", original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | None:
    """A call of `generate` as a store understands it; None: it must run without the store."""
    model: Any = attachment.model
    try:
        named = inspect.signature(original).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    extra = named.pop("kwargs", {})
    settings = model.generation_config
    # None leaves an argument open, but as a setting it is a value: `eos_token_id=None` has no token end the answer.
    set_here = {name: value for name, value in extra.items() if hasattr(settings, name)}
    given = {name: value for name, value in {**named, **extra}.items() if value is not None} | set_here
    ids: Any = given.get("inputs", given.get("input_ids"))
    if ("inputs" in given) == ("input_ids" in given) or model.training or attachment.needs_whole:
        return None
    others = [v for name, v in given.items() if name not in ("inputs", "input_ids", "attention_mask")]
    if not _tokens(ids) or any(isinstance(v, Tensor) for v in others):
        return None
    config = given.get("generation_config", settings)

    def asked(name: str) -> Any:
        if name in given:
            return given[name]
        chosen = getattr(config, name, None)
        # What a given configuration leaves open transformers takes from the model's own.
        return getattr(settings, name, None) if chosen is None else chosen

    if any(asked(name) for name in _ELSEWHERE) or asked("use_cache") is False:
        return None
    if asked("guidance_scale") not in (None, 1, 1.0) or "swiftkv" in given:
        return None
    rows = _rows(ids, given.get("attention_mask"), asked("pad_token_id"))
    copies = max(asked("num_beams") or 1, asked("num_return_sequences") or 1)
    if rows is None or max(map(len, rows)) < ids.shape[1]:  # columns of padding alone, of which nothing is restored
        return None
    if ids.shape[1] > (getattr(model.config, "max_position_embeddings", None) or ids.shape[1]):
        return None  # refused, and not only where all of it must be read
    return Call(given, ids, rows, copies)


def _tokens(ids: Any) -> bool:
    plain = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() and ids.dtype != torch.bool
    return plain and len(ids) > 0 and ids.shape[1] > 1


def _rows(ids: Tensor, mask: Any, pad: Any) -> list[list[int]] | None:
    """The prompts without their padding; None where that is not all on the left, or not clear."""
    listed: list[list[int]] = ids.tolist()
    if mask is None:  # then transformers takes padding tokens for padding
        return None if pad is not None and any(pad in row for row in listed) else listed
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    real: Any = mask.bool().cpu()
    if bool((real[:, 1:] < real[:, :-1]).any()) or bool((real.sum(1) < 2).any()):
        return None
    return [row[-n:] for row, n in zip(listed, real.sum(1).tolist(), strict=True)]
