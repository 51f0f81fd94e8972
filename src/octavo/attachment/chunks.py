"""How a long forward is cut into chunks, and how many tokens of each SwiftKV's later layers must run."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

WHOLE = 16  # chunks of up to so many tokens run all layers: kernels for few tokens gain more than skipping saves


def default_chunk(device: torch.device) -> int:
    """Tokens per prefill step: a GPU waits for launches where chunks are small, a CPU leaves its caches where not."""
    return 8192 if device.type == "cuda" else 512


def chunk_bounds(columns: int, chunk: int, wanted: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, keep) of each chunk, in order; `keep`: how many of its last tokens' logits may be asked for.

    `wanted`: how many of the last columns' logits are asked for. What is kept are always the last columns of all.
    """
    for first in range(0, columns, chunk):
        last = min(first + chunk, columns)
        keep = max(0, last - max(first, columns - wanted))
        yield first, last, last - first if keep and last - first <= WHOLE else keep


def part_of(kwargs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The arguments of tokens first..last of a long forward; its 2-D mask is with the step already."""
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids", "cache_position"):
        value = part.get(name)
        if value is not None:
            part[name] = value[first:last] if name == "cache_position" else value[:, first:last]
    mask = part.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        part["attention_mask"] = None
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


def padding(mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of the new tokens are real, [B, columns] bool, from a 2-D mask that ends with them; None: all are."""
    if mask is None or mask.ndim != 2 or bool(mask[:, -columns:].all()):
        return None
    return mask[:, -columns:].bool()
