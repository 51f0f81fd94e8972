"""Attention over ragged pages in plain torch, one row after another: each KV head's compacted past beside the chunk.

The work per row is one matrix product over (live slots + chunk) keys, so what is evicted is never touched: at 8,000
tokens and 8x compression a chunk of 512 meets about 1,500 keys, not 8,000.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.pages import Chunk, Pages, Scoring, read
from octavo.attention.torch import scored


def attend(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32
    length: Tensor,  # [B, H]     int32
    scale: float,
    chunk: Chunk | None = None,
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D]
    """`reference.attend`; it reads lengths on the host. Gradients reach queries and chunk, pages are constants.

    Chunk and queries share one dtype. Slots in use must be finite, also those that no query sees.
    """
    B, Hq, n, D = query.shape
    H, S = table.shape[1], pages.key.shape[1]
    group = Hq // H
    out = query.new_zeros(B, Hq, n, D)
    if n == 0:
        return out.transpose(1, 2)
    used = length.tolist()
    for b in range(B):
        last, q_at = at[b].max(), at[b, :, None]  # [n, 1]
        first = torch.where(q_at >= 0, q_at, last).min()
        for h in range(H):
            ids = table[b, h, : -(-used[b][h] // S)].long()
            position, expiry = pages.position[ids].flatten()[: used[b][h]], pages.expiry[ids].flatten()[: used[b][h]]
            expiry = expiry.masked_fill(position < 0, -2)  # nobody sees what holds nothing
            # What every query of the chunk sees comes first and needs no mask: most of the past.
            lasting = (expiry >= last) & (position <= first)
            order = torch.cat([lasting.nonzero(), (~lasting).nonzero()])[:, 0]
            free = int(lasting.sum())
            some = order[free:]
            hidden = [_hidden(position[some], expiry[some], q_at)]
            k, v = _stored(pages, ids, order, query.dtype)
            if chunk is not None:
                k, v = torch.cat([k, chunk.key[b, h]]), torch.cat([v, chunk.value[b, h]])
                chunk_expiry = chunk.expiry[b, h].masked_fill(chunk.position[b] < 0, -2)
                hidden.append(_hidden(chunk.position[b], chunk_expiry, q_at))
            heads = slice(h * group, (h + 1) * group)
            scores = scoring
            if scoring is not None and scoring.sinks is not None:
                scores = scoring._replace(sinks=scoring.sinks[heads])
            out[b, heads] = _row(query[b, heads], k, v, free, torch.cat(hidden, 1), scale, scores)
    return out.transpose(1, 2).masked_fill((at < 0)[:, :, None, None], 0.0)


def _row(
    query: Tensor, key: Tensor, value: Tensor, free: int, hidden: Tensor, scale: float,
    scoring: Scoring | None = None,
) -> Tensor:  # fmt: skip
    """Attention [G, n, D] of a row's queries to keys and values [U, D]: all see the first `free`, the others who may.

    `hidden` [n, U - free] bool: who may not.
    """
    (G, n, D), U = query.shape, key.shape[0]
    if U == 0:
        return torch.zeros_like(query)
    mask = query.new_zeros(n, U)
    mask[:, free:].masked_fill_(hidden, float("-inf"))
    # A query that sees nothing looks at everything, so that no softmax is empty; its output is cleared.
    blind = hidden.all(1, keepdim=True) if free == 0 else None
    if blind is not None:
        mask.masked_fill_(blind, 0.0)
    if scoring is not None:
        out = scored.attend(query, key[None], value[None], mask[None], scale, scoring)
        return out if blind is None else out.masked_fill(blind, 0.0)
    out = F.scaled_dot_product_attention(
        query[None],  # a batch of one: CPUs have no fast form without
        key.expand(1, G, U, D),
        value.expand(1, G, U, D),
        attn_mask=mask[None, None],
        scale=scale,
    )[0]
    return out if blind is None else out.masked_fill(blind, 0.0)


def _hidden(position: Tensor, expiry: Tensor, q_at: Tensor) -> Tensor:
    """Which of U slots or tokens each query at `q_at` [n, 1] may not see, [n, U] bool."""
    return (position > q_at) | (q_at > expiry)


def _stored(pages: Pages, ids: Tensor, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [U, D] of the slots `order` of a row whose pages are `ids`."""
    made = []
    for stored, scales in ((pages.key, pages.key_scale), (pages.value, pages.value_scale)):
        scale = None if scales is None else scales[ids].flatten()[order]
        raw = stored.view(torch.uint8) if scales is not None else stored  # indexing does not know float8
        made.append(read(raw[ids].flatten(0, 1)[order].view(stored.dtype), scale, dtype))
    return made[0], made[1]
