"""Models whose queries lend a channel to their gates, as `octavo.dms.checkpoint` tells of published ones.

The channel is the last of the query of each group's first query head. Attention gets queries after RoPE, which has
turned it together with channel D/2 - 1, so it is turned back here: what is read is what the query had before, and what
is left is what RoPE makes of a query in which the channel is zero, with the channel zero in it too.
"""

from typing import Any

from torch import Tensor

from octavo.dms.checkpoint import SEPARATE
from octavo.swiftkv.transform import Rotary


def lends_channel(config: Any) -> bool:
    """Whether queries of a model with this configuration lend a channel to its gates."""
    return getattr(config, SEPARATE, None) is False


def take_channel(query: Tensor, kv_heads: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """(queries [B, Hq, N, D] without the channel, what it was before RoPE [B, N, kv_heads] float32).

    `rotary`: cosines and sines [B, N, D] that the queries were turned by.
    """
    groups, half = query.shape[1] // kv_heads, query.shape[-1] // 2
    cos, sin = (part[..., -1].float()[:, None] for part in rotary)  # [B, 1, N]
    low, last = query[:, ::groups, :, half - 1].float(), query[:, ::groups, :, -1].float()
    size = cos * cos + sin * sin  # not 1 where RoPE scales attention
    query = query.clone()
    query[:, ::groups, :, half - 1] = ((low * cos + last * sin) / size * cos).to(query.dtype)
    query[:, ::groups, :, -1] = 0
    return query, ((last * cos - low * sin) / size).transpose(1, 2)
