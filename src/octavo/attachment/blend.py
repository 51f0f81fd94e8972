"""Which tokens of text that was computed elsewhere suffer most from it: CacheBlend (arXiv 2405.16444).

The values of the second layer, computed for all tokens, say how far each stored token is off, since a token that is off
there is off in all later layers. Only for caches without eviction: elsewhere not every head has every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.attachment.forward import Forward
from octavo.kv.ragged import between

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

LAYER = 1


class _EnoughError(Exception):
    """The values that are wanted are there."""


@dataclass
class _Values(Forward):
    """A forward without a cache that ends at the layer whose values are wanted."""

    values: list[Tensor] = field(default_factory=list)  # [1, H, N, D] each

    def masked(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        self.values.append(value)
        if len(self.values) > LAYER:
            raise _EnoughError
        return super().masked(query, key, value, *rest)


@torch.no_grad()
def second_values(attachment: "Attachment", tokens: Any) -> Tensor | None:
    """The values [H, N, D] that the second layer has for a prompt, on the host; None: a model of one layer."""
    ids = torch.as_tensor(tokens, dtype=torch.int64)[None].to(attachment.model.device)
    forward = _Values(attachment.layout, borrowed=attachment.borrowed)
    try:
        attachment.original(input_ids=ids, use_cache=False, octavo_forward=forward)
        return None
    except _EnoughError:
        return forward.values[LAYER][0].cpu()


def deviating(attachment: "Attachment", tokens: Any, taken: Sequence[Any], share: float) -> list[int]:
    """The positions of that share of the tokens of moved text whose stored values are most off, in order."""
    truth, found = second_values(attachment, tokens), []
    if truth is None:
        return []
    for piece in taken:
        if piece.exact:
            continue
        part = between(piece.extent.kept, piece.first, piece.last)
        before, n = int(part.counts[:LAYER].sum()), int(part.counts[LAYER].sum())
        stored = part.value[before : before + n].view(len(truth), -1, truth.shape[-1])
        off = (stored.float() - truth[:, piece.first + piece.by : piece.last + piece.by].float()).square().sum((0, 2))
        found += list(zip(off.tolist(), range(piece.first + piece.by, piece.last + piece.by), strict=True))
    found.sort(reverse=True)
    return sorted(position for _, position in found[: int(share * len(found))])


def without(taken: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """What is taken, but for the tokens at some positions of the new prompt."""
    gone, out = set(positions), []
    for piece in taken:
        at = piece.first
        for p in (*range(piece.first, piece.last), piece.last):
            if p == piece.last or p + piece.by in gone:
                if at < p:
                    out.append(piece._replace(first=at, last=p))
                at = p + 1
    return out
