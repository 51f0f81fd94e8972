"""Attention whose scores are capped or meet a sink, which no fused kernel knows: products and a softmax."""

import torch
from torch import Tensor, nn

from octavo.attention.pages import Scoring


def attend(
    query: Tensor,  # [..., Hq, n, D]
    key: Tensor,  # [..., H, U, D]
    value: Tensor,  # [..., H, U, D]
    mask: Tensor,  # [..., 1 or H, n, U] bool, who sees what, or what is added to scores; no row may be empty
    scale: float,
    scoring: Scoring,
    dropout: float = 0.0,
) -> Tensor:  # [..., Hq, n, D]
    """Attention of query heads to their groups' keys, in float32 but for the products. Gradients reach all tensors.

    `dropout`: the share of weights that are dropped, a sink's aside.
    """
    Hq, H = query.shape[-3], key.shape[-3]
    grouped = query.reshape(*query.shape[:-3], H, Hq // H, *query.shape[-2:])  # [..., H, G, n, D]
    scores = scoring.capped((grouped @ key.unsqueeze(-3).mT).float() * scale)
    mask = mask.unsqueeze(-3)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(H, Hq // H, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return (weights @ value.unsqueeze(-3)).flatten(-4, -3)
