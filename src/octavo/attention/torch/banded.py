"""Attention of a whole first chunk under eviction in plain torch: a band near the diagonal, and what is kept before it.

A token that is marked is forgotten after `window` more, so a query sees everything near it, and of what lies further
back only what is kept for ever. Queries are taken in blocks at least as long as the window. Near: a block's keys and
those of the block before it, under a mask. Far: the kept keys before these, all of them and without a mask, since all
queries of a block see them. The two are merged by their log-sum-exp. At 8x eviction the far part meets an eighth of the
keys, and no mask is wider than two blocks.

All layers of a forward use the same buffers, in which rows (sequence, KV head) lie one after another, each with a block
of zeros before it. So every pair of neighbouring blocks is one view, and a layer costs some twenty operations: on a GPU
launching them is what takes the time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDED = 64  # block lengths are multiples of it
HIDDEN = -6e4  # added to a score, makes its weight zero in every dtype


class Bands(NamedTuple):
    """Buffers and constants of one forward. R = B * H rows of C - 1 blocks of Q tokens, after a block of zeros each."""

    query: Tensor  # [B, H, C, G, Q, D]; the last block of each row belongs to no token
    pair: Tensor  # [2, R * C + 1, Q, D]: keys and values
    marked: Tensor  # [R * C + 1, Q] in the dtype of queries: 1 for marked tokens
    never: Tensor  # [C, Q, 2 * Q]: -inf where no key is or where it comes after the query, else 0
    past: Tensor  # [Q, 2 * Q]: HIDDEN where a key lies further back than the window, else 0
    order: Tensor  # [R, N + 2] int64: tokens of each row, the kept ones from place 1 on; places 0 and N + 1 are spill
    tokens: Tensor  # [N] int64: 0, 1...
    last: Tensor  # [C] int64: the last key before each block's band
    some: Tensor  # [C] int64: 1 where there is one, else 0
    used: Tensor  # [R, C] int32: how many kept keys lie before each block's band
    weight: Tensor  # [R * C, G, Q] in the dtype of queries: the share of what is kept before the band
    begin_query: Tensor  # [R * C + 1] int32: where each block's queries begin
    begin_key: Tensor  # [R * C + 1] int32: where each row's keys begin, once for each of its blocks


def suits(query: Tensor, key: Tensor) -> bool:
    """Whether `attend` is the way for these: on CUDA in 16 bits, all of the chunk's tokens asking."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] == key.shape[2]


def bands(query: Tensor, heads: int, window: int) -> Bands:
    """Buffers for attention of queries like `query` [B, Hq, N, D] to `heads` KV heads."""
    (B, Hq, N, D), device = query.shape, query.device
    Q = -(-max(window, 1) // ROUNDED) * ROUNDED
    C = -(-N // Q) + 1
    R, G = B * heads, Hq // heads
    row, column = torch.arange(Q, device=device)[:, None], torch.arange(2 * Q, device=device)
    never = torch.zeros(C, Q, 2 * Q, dtype=query.dtype, device=device)
    never.masked_fill_(column - Q > row, float("-inf"))
    never[0, :, :Q] = float("-inf")
    past = torch.where(row + Q - column > window, HIDDEN, 0.0).to(query.dtype)
    last = torch.arange(-1, C - 1, device=device) * Q - 1
    last[C - 1] = -1
    return Bands(
        query.new_zeros(B, heads, C, G, Q, D),
        query.new_zeros(2, R * C + 1, Q, D),
        query.new_zeros(R * C + 1, Q),
        never,
        past,
        torch.zeros(R, N + 2, dtype=torch.int64, device=device),
        torch.arange(N, device=device),
        last.clamp(min=0),
        (last >= 0).long(),
        torch.zeros(R, C, dtype=torch.int32, device=device),
        query.new_zeros(R * C, G, Q),
        torch.arange(R * C + 1, dtype=torch.int32, device=device) * (G * Q),
        torch.arange(R + 1, dtype=torch.int32, device=device).repeat_interleave(C)[: R * C + 1] * N,
    )


def attend(
    b: Bands,
    query: Tensor,  # [B, Hq, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    marked: Tensor,  # [B, H, N] bool: forgotten after the window
    scale: float,
) -> Tensor:  # [B, N, Hq, D], dtype of `query`
    """`reference.attend` of N tokens at positions 0 to N - 1 to each other, where nothing is in pages or padded.

    The host does not wait for the device. No gradients; `b` (see `bands`) serves one layer after another.
    """
    (B, Hq, N, D), (_, H, C, G, Q, _) = query.shape, b.query.shape
    R, whole = B * H, N // Q
    blocks = b.query.transpose(2, 3)  # [B, H, G, C, Q, D]
    grouped = query.unflatten(1, (H, G))  # type: ignore[no-untyped-call]
    blocks[:, :, :, :whole].copy_(grouped[:, :, :, : whole * Q].unflatten(3, (whole, Q)))
    if whole * Q < N:
        blocks[:, :, :, whole, : N - whole * Q].copy_(grouped[:, :, :, whole * Q :])
    tokens = b.pair[:, : R * C].view(2, R, C * Q, D)[:, :, Q : Q + N]  # [2, R, N, D]
    for there, given in zip(tokens, (key, value), strict=True):
        there.unflatten(0, (B, H)).copy_(given)
    b.marked[: R * C].view(B, H, C * Q)[:, :, Q : Q + N].copy_(marked)
    near, near_lse = _near(b, scale)
    far, far_lse = _far(b, tokens, marked.reshape(R, N), scale)
    torch.sigmoid(far_lse.sub_(near_lse), out=b.weight)
    out = torch.lerp(near, far, b.weight[..., None])  # [R * C, G, Q, D]
    out = out.view(B, H, C, G, Q, D)[:, :, : C - 1].permute(0, 2, 4, 1, 3, 5)
    return out.reshape(B, (C - 1) * Q, Hq, D)[:, :N]


def _near(b: Bands, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [R * C, G, Q, D], its log-sum-exp [R * C, G, Q] float32) over a block and the one before it."""
    _, slots, Q, D = b.pair.shape
    C, G = b.never.shape[0], b.query.shape[3]
    key, value = b.pair.as_strided((2, slots - 1, 1, 2 * Q, D), (slots * Q * D, Q * D, 0, D, 1)).unbind(0)
    marked = b.marked.as_strided(((slots - 1) // C, C, 1, 2 * Q), (C * Q, Q, 0, 1))
    bias = torch.addcmul(b.never, b.past, marked).view(slots - 1, 1, Q, 2 * Q)
    query = b.query.view(slots - 1, G, Q, D)
    key, value, bias = (t.expand(-1, G, -1, -1) for t in (key, value, bias))
    if not query.is_cuda:
        return _plain(query, key, value, bias, scale)
    made = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
    return made[0], made[1][..., :Q]


def _far(b: Bands, tokens: Tensor, marked: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention [R * C, G, Q, D], its log-sum-exp [R * C, G, Q] float32) over what is kept before the band.

    `tokens` [2, R, N, D] are keys and values, `marked` [R, N]. Where nothing is kept log-sum-exp is very low.
    """
    (_, R, N, D), (_, _, C, G, Q, _) = tokens.shape, b.query.shape
    rank = (~marked).cumsum(1)  # [R, N]
    b.order.scatter_(1, torch.where(marked, N + 1, rank), b.tokens.expand(R, -1))
    kept = tokens.gather(2, b.order[None, :, 1 : N + 1, None].expand(2, -1, -1, D))
    torch.mul(rank.index_select(1, b.last), b.some, out=b.used)
    if not tokens.is_cuda:
        bias = torch.zeros(R, C, 1, N, device=tokens.device)
        bias.masked_fill_(b.tokens >= b.used[:, :, None, None], float("-inf"))
        key, value = (t[:, None].expand(-1, C, -1, -1) for t in kept)
        out, lse = _plain(b.query.view(R, C, G * Q, D), key, value, bias, scale)
    else:
        key, value = (t.view(R * N, 1, D) for t in kept)
        # Each block of queries is a sequence of its own, which meets the first `used` of its row's keys.
        out, lse = torch.ops.aten._flash_attention_forward(
            b.query.view(-1, 1, D), key, value, b.begin_query, b.begin_key, G * Q, N, 0.0, False, False,
            scale=scale, seqused_k=b.used.view(-1),
        )[:2]  # fmt: skip
    # The kernel says infinity where there are no keys.
    return out.view(R * C, G, Q, D), lse.view(R * C, G, Q).nan_to_num_(posinf=HIDDEN, neginf=HIDDEN)


def _plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(attention, its log-sum-exp) from products and a softmax, which any device has; zeros and -inf for nothing."""
    scores = query.float() @ key.float().mT * scale + bias.float()
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return (weights @ value.float()).to(query.dtype), lse
