"""How a long forward is cut into chunks, and how many tokens of each SwiftKV's later layers must run."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.attention import FEW


def default_chunk(device: torch.device) -> int:
    """Tokens per prefill step.

    On a GPU every step costs kernel launches, so few long steps are fastest. On a CPU a chunk's keys, values and
    masks should stay in the processor's caches, so steps are short.
    """
    return 8192 if device.type == "cuda" else 512


def chunk_bounds(
    before: int, columns: int, chunk: int, wanted: int, kept: Collection[int] = ()
) -> Iterator[tuple[int, int, int]]:
    """(first, last, keep) of each chunk, in order; `keep`: how many of its last tokens' logits may be asked for.

    `before`: tokens read already. Chunks end at multiples of `chunk` from the sequence's first token, so that a text
    is cut in the same places whether it comes in one call or in several. `wanted`: how many of the last columns'
    logits are asked for; these are always the last columns of all. A chunk so short that it runs as a decode step
    (`FEW`) keeps all: there the kernels for few tokens gain more than skipping layers saves. `kept`: columns of the
    whole sequence where a chunk must end as well.
    """
    first = 0
    while first < columns:
        last = min(columns, first + chunk - (before + first) % chunk)
        last = min([last, *(p - before for p in kept if p - before > first)])
        keep = max(0, last - max(first, columns - wanted))
        yield first, last, last - first if keep and last - first <= FEW else keep
        first = last


def part_of(kwargs: dict[str, Any], first: int, last: int, masked: bool = False) -> dict[str, Any]:
    """The arguments of tokens first..last of a long forward; its 2-D mask is with the forward already.

    `masked`: layers that do not attend read the mask too, so it comes along up to those tokens.
    """
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "per_layer_inputs", "token_type_ids"):
        if part.get(name) is not None:
            part[name] = part[name][:, first:last]
    for name in ("position_ids", "cache_position"):  # [N], [B, N] or, where pictures have several axes, [axes, B, N]
        if part.get(name) is not None:
            part[name] = part[name][..., first:last]
    mask = part.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        columns = kwargs["input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"].shape[1]
        part["attention_mask"] = mask[:, : mask.shape[1] - columns + last] if masked else None
    return part


def join(parts: list[Any]) -> Any:
    """One output of many chunks': whatever has a token dimension is joined, the cache is taken from the last."""
    out = parts[-1]
    if len(parts) == 1:
        return out
    if isinstance(out, tuple):
        return tuple(_joined(values, len(out[0])) for values in zip(*parts, strict=True))
    for name in ("last_hidden_state", "hidden_states", "router_logits"):
        if getattr(out, name, None) is not None:
            setattr(out, name, _joined([getattr(p, name) for p in parts], len(out.last_hidden_state)))
    return out


def _joined(values: Sequence[Any], batch: int) -> Any:
    """One field of all chunks: tensors [B, n, ...] or [B * n, ...] (a router's) along n, tuples of these each."""
    if isinstance(values[0], tuple):
        return tuple(_joined(each, batch) for each in zip(*values, strict=True))
    if not isinstance(values[0], Tensor):
        return values[-1]
    if values[0].ndim > 2:
        return torch.cat(list(values), 1)
    return torch.cat([value.unflatten(0, (batch, -1)) for value in values], 1).flatten(0, 1)
