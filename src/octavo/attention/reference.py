"""Attention over ragged pages, written to be read: the definition every fast kernel is tested against.

Every cached slot of a KV head carries `position` and `expiry`, and one rule decides what a query sees:

    a query at position q sees a slot  iff  position <= q <= expiry

A row is one (sequence, KV head): `length` slots, in the pages that its line of the table names. The tokens of a
chunk are not in the pages yet; they take part with their own position and expiry under the same rule. Position -1
marks padding: such a token is seen by nobody and attends to nothing (its output is zero).
"""

import torch
from torch import Tensor

from octavo.attention.pages import Chunk, Pages, Scoring, read


def attend(
    query: Tensor,  # [B, Hq, n, D]
    at: Tensor,  # [B, n]         int32, positions of the queries
    pages: Pages,
    table: Tensor,  # [B, H, M]   int32, page ids of each row
    length: Tensor,  # [B, H]     int32, slots in use of each row
    scale: float,
    chunk: Chunk | None = None,  # [B, H, N] new tokens
    scoring: Scoring | None = None,
) -> Tensor:  # [B, n, Hq, D], dtype of `query`
    """Exact attention of n queries over the slots of their rows and a chunk, one row at a time.

    Query head j reads KV head j // (Hq // H), so Hq is a multiple of H. Scores are multiplied by `scale`. Scores,
    softmax and sums are computed in float64 when the queries are float64, in float32 otherwise. A query that sees
    nothing gets zeros. A sink takes its part of every softmax and gives nothing. Page ids and lengths are trusted:
    ceil(length / page_size) columns of the table are read.
    """
    B, Hq, n, D = query.shape
    H, S = table.shape[1], pages.key.shape[1]
    group = Hq // H
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(B, n, Hq, D)
    for b in range(B):
        for h in range(H):
            used = int(length[b, h])
            ids = table[b, h, : -(-used // S)].long()
            scales = [None if s is None else s[ids].flatten()[:used] for s in (pages.key_scale, pages.value_scale)]
            k = read(pages.key[ids].flatten(0, 1)[:used], scales[0], wide)  # [U, D]
            v = read(pages.value[ids].flatten(0, 1)[:used], scales[1], wide)
            position, expiry = pages.position[ids].flatten()[:used], pages.expiry[ids].flatten()[:used]  # [U]
            if chunk is not None:
                k, v = torch.cat([k, chunk.key[b, h].to(wide)]), torch.cat([v, chunk.value[b, h].to(wide)])
                position, expiry = torch.cat([position, chunk.position[b]]), torch.cat([expiry, chunk.expiry[b, h]])
            q_at = at[b, :, None]  # [n, 1]
            visible = (position >= 0) & (position <= q_at) & (q_at <= expiry)  # [n, U+N]
            q = query[b, h * group : (h + 1) * group].to(wide)  # [G, n, D]
            scores = q @ k.T * scale  # [G, n, U+N]
            if scoring is not None:
                scores = scoring.capped(scores)
            scores = scores.masked_fill(~visible, float("-inf"))
            if scoring is not None and scoring.sinks is not None:
                sink = scoring.sinks[h * group : (h + 1) * group].to(wide)[:, None, None].expand(-1, n, 1)
                scores = torch.cat([scores, sink], -1)
            weights = scores.softmax(-1)[..., : len(k)].nan_to_num(0.0)  # a padded query sees nothing
            out[b, :, h * group : (h + 1) * group] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out
