"""Attention over ragged pages in plain torch, all rows at once and padded to the longest: for a GPU.

A dozen operators per layer whatever the number of rows, where a loop over rows costs a dozen for each: a GPU gets
through the products of a layer sooner than the host can launch that many.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.pages import Chunk, Pages, Scoring
from octavo.attention.pages import rows as rows_of
from octavo.attention.torch import scored

MASK = 2**27  # elements of a mask that is made at once; longer chunks go in blocks of queries


def attend(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32; as few columns as hold all slots
    length: Tensor,  # [B, H]     int32
    scale: float,
    chunk: Chunk | None = None,
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D]
    """`reference.attend`; pages must be finite also where nothing is stored.

    Holds B * H * (M * S + N) keys and values beside the pages, and a mask of at most `MASK` elements, or one query's
    where that is more.
    """
    B, Hq, n, D = query.shape
    if query.numel() == 0:
        return query.transpose(1, 2)
    H = table.shape[1]
    k, v = (t.flatten(2, 3) for t in rows_of(pages, table, query.dtype))  # [B, H, U, D]
    position, expiry = slots(pages, table, length)
    if chunk is not None:
        k, v = torch.cat([k, chunk.key], 2), torch.cat([v, chunk.value], 2)
        position = torch.cat([position, chunk.position[:, None].expand(-1, H, -1)], 2)
        expiry = torch.cat([expiry, chunk.expiry], 2)
    expiry = expiry.masked_fill(position < 0, -2)  # nobody sees padding
    rows = query.reshape(B * H, Hq // H, n, D)
    k_rows, v_rows = (t.flatten(0, 1)[:, None].expand(-1, Hq // H, -1, -1) for t in (k, v))
    block = max(1, MASK // (B * H * k.shape[2]))
    parts = []
    for start in range(0, n, block):
        q_at = at[:, None, start : start + block, None]  # [B, 1, m, 1]
        seen = (position[:, :, None] <= q_at) & (q_at <= expiry[:, :, None])  # [B, H, m, U + N]
        # A query that sees nothing looks at all that there is, so that no softmax is empty; its output is cleared.
        seen = seen | ~seen.any(-1, keepdim=True)
        if scoring is not None:
            parts.append(scored.attend(query[:, :, start : start + block], k, v, seen, scale, scoring))
            continue
        mask = seen.flatten(0, 1)[:, None]
        some = rows[:, :, start : start + block]
        parts.append(F.scaled_dot_product_attention(some, k_rows, v_rows, attn_mask=mask, scale=scale))
    out = (torch.cat(parts, 2) if len(parts) > 1 else parts[0]).reshape(B, Hq, n, D).transpose(1, 2)
    return out.masked_fill((at < 0)[:, :, None, None], 0.0)


def slots(pages: Pages, table: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and expiries of all slots of rows, [..., M * S] int32; -1 and -2 past their length, seen by nobody.

    `table` [..., M] int32, `length` [...] int32.
    """
    position, expiry = pages.position[table].flatten(-2), pages.expiry[table].flatten(-2)
    empty = torch.arange(position.shape[-1], device=table.device) >= length[..., None]
    return position.masked_fill(empty, -1), expiry.masked_fill(empty, -2)
