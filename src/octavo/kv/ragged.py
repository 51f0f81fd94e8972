"""Slots of all layers and heads one after another (`octavo.kv.snapshot.Ragged`): cut, joined, ordered."""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.pages import CODES
from octavo.kv.snapshot import Ragged


def between(part: Ragged, first: int, last: int) -> Ragged:
    """The slots at positions `first` up to, not including, `last`; the same tensors where that is all of them."""
    wanted = (part.position >= first) & (part.position < last)
    if bool(wanted.all()):
        return part
    index = wanted.nonzero()[:, 0]
    counts = torch.bincount(heads(part)[index], minlength=part.counts.numel()).view(part.counts.shape)
    return picked(part, index, counts.int())


def merged(parts: Sequence[Ragged]) -> Ragged:
    """All slots of some parts as one part, ordered by layer, head and position."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in Ragged._fields[1:] if all(getattr(part, name) is not None for part in parts)]
    whole = Ragged(
        torch.stack([part.counts for part in parts]).sum(0, dtype=torch.int32),
        **{name: _cat([getattr(part, name) for part in parts]) for name in names},
    )
    order = (torch.cat([heads(part) for part in parts]) * 2**31 + whole.position).argsort()
    return picked(whole, order, whole.counts)


def heads(part: Ragged) -> Tensor:
    """Each slot's head, counted over all layers, int64 [n]."""
    every = torch.arange(part.counts.numel(), device=part.counts.device)
    return every.repeat_interleave(part.counts.flatten().long(), output_size=len(part.position))


def picked(part: Ragged, index: Tensor, counts: Tensor) -> Ragged:
    """The slots at some indices, of which each head has `counts` [L, H]."""
    tensors = {name: take(t, index) for name, t in part.tensors.items() if name != "counts"}
    return Ragged(counts, **tensors)


def _cat(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dtype not in CODES:
        return torch.cat(tensors)
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)


def take(t: Tensor, index: Tensor) -> Tensor:
    """t[index]; neither indexing nor `index_select` knows float8."""
    return t.view(torch.uint8).index_select(0, index).view(t.dtype) if t.dtype in CODES else t.index_select(0, index)


def stacked(parts: Sequence[Ragged]) -> Ragged:
    """Slots of layers that follow each other as one part."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].tensors
    return Ragged(**{name: _cat([part.tensors[name] for part in parts]) for name in names})
