"""The visibility rule as a mask over one whole forward: for training, and as the oracle of eviction.

A key j is seen by query i when j <= i. Past the window (i - j > window) its score gets `log_keep[j]` added:
logsigmoid(-gate logit) in training, which lets gradients reach the gate; 0 or -inf for hard decisions,
which is exactly what eviction does to the pages.
"""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.lifetime import Lifetime
from octavo.attention.pages import Scoring
from octavo.attention.torch import scored

BLOCK = 512  # queries whose mask is made at once
COMPILATIONS = 64  # of FlexAttention that are kept: one per sequence length, batch and gradient mode


class Packed:
    """Which document each token of packed rows belongs to; made once for all layers of a forward.

    `document` [B, T] int32 on the device of the queries; -1 is padding, which is a document of its own.
    """

    def __init__(self, document: Tensor) -> None:
        self.document = document

    @property
    def first(self) -> Tensor:
        """The column [B, T] int64 at which each token's document begins."""
        columns = torch.arange(self.document.shape[1], device=self.document.device)
        begins = self.document.diff(dim=1, prepend=self.document[:, :1] - 1) != 0
        return torch.where(begins, columns, 0).cummax(1).values

    @cached_property
    def blocks(self) -> Any:
        """The same as FlexAttention's `BlockMask`, causality in it."""
        from torch.nn.attention.flex_attention import create_block_mask

        document, (B, T) = self.document, self.document.shape
        return create_block_mask(
            lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k]), B, None, T, T, device=str(document.device)
        )


def dense_attention(
    query: Tensor,  # [B, Hq, T, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, D]
    log_keep: Tensor | None,  # [B, H, T] float32, None: nothing is ever forgotten
    window: int,
    scale: float,
    valid: Tensor | None = None,  # [B, T] bool, False is padding
    packed: Packed | None = None,  # rows of several documents: a token sees its own only
    lifetime: Lifetime | None = None,  # None: the layer attends to everything
    scoring: Scoring | None = None,
    dropout: float = 0.0,  # the share of weights that are dropped, as SDPA drops them
    pictures: Tensor | None = None,  # [B, T] of any integer dtype: tokens of one picture see each other; -1: of none
) -> Tensor:  # [B, T, Hq, D]
    """Causal attention with the gate's mask; FlexAttention on CUDA, a masked SDPA elsewhere, for windows and dropout.

    `window` and ages are in tokens. With padding, positions are counted over the valid tokens, as the cache counts
    them, and what a padded query gets has no meaning. Packed rows take no `valid`: together they raise ValueError.
    Query, key and value share one dtype; gradients reach them and `log_keep`. The soft mask is the training rule of
    DMS ("Inference-Time Hyper-Scaling with KV Cache Compression", Lancucki et al., NeurIPS 2025).
    """
    if valid is not None and packed is not None:
        raise ValueError("attention: packed rows are padded by their documents (-1), they take no `valid`")
    grouped = query.shape[1] != key.shape[1]
    if lifetime is not None and not lifetime.chunked and lifetime.length >= query.shape[2]:
        lifetime = None
    special = lifetime is not None or scoring is not None
    if log_keep is None and valid is None and packed is None and pictures is None and not special:
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    flex = query.is_cuda and not dropout and pictures is None and not torch.compiler.is_compiling()  # it does itself
    if flex and valid is None and not special:
        return _flex(query, key, value, log_keep, window, scale, packed)
    length, told = query.shape[2], (log_keep, window, scale, valid, packed, lifetime, scoring, dropout, pictures)
    # A loop would make a graph for one length alone, and tokens of a picture see later ones.
    if torch.compiler.is_compiling() or pictures is not None:
        return _rows(query, key, value, *told, 0, length).transpose(1, 2)
    parts = [_rows(query, key, value, *told, i, min(i + BLOCK, length)) for i in range(0, length, BLOCK)]
    return torch.cat(parts, 2).transpose(1, 2)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor | None,
    window: int,
    scale: float,
    valid: Tensor | None,
    packed: Packed | None,
    lifetime: Lifetime | None,
    scoring: Scoring | None,
    dropout: float,
    pictures: Tensor | None,
    first: int,
    last: int,
) -> Tensor:  # [B, Hq, last - first, D]
    """Queries first..last on the keys before `last`, under a mask of their own."""
    group = query.shape[1] // key.shape[1]
    mask = _mask(
        log_keep, window, valid, packed, lifetime, pictures, query, first, last
    )  # [B, 1 or H, last - first, last]
    if scoring is not None:
        part = query[:, :, first:last], key[:, :, :last], value[:, :, :last]
        return scored.attend(*part, mask, scale, scoring, dropout)
    mask = mask.repeat_interleave(group, 1) if mask.shape[1] > 1 else mask
    return F.scaled_dot_product_attention(
        query[:, :, first:last],
        key[:, :, :last],
        value[:, :, :last],
        attn_mask=mask.to(query.dtype),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=group > 1,
    )


def _mask(
    log_keep: Tensor | None,
    window: int,
    valid: Tensor | None,
    packed: Packed | None,
    lifetime: Lifetime | None,
    pictures: Tensor | None,
    query: Tensor,
    first: int,
    last: int,
) -> Tensor:  # [B, 1 or H, last - first, last] float32
    """What is added to the scores of queries first..last on the keys before `last`."""
    B = query.shape[0]
    ones = torch.ones(B, last, dtype=torch.bool, device=query.device) if valid is None else valid[:, :last]
    position = ones.cumsum(1) - 1  # [B, last]
    age = position[:, first:, None] - position[:, None, :]  # [B, N, last]
    columns = torch.arange(last, device=query.device)
    rows = columns[first:, None]
    seen = columns <= rows
    if pictures is not None:
        number = pictures[:, :last]
        seen = seen | ((number[:, first:, None] == number[:, None]) & (number >= 0)[:, None])
    seen = seen & ones[:, None, :]  # [B, N, last]
    if lifetime is not None and lifetime.chunked:
        if packed is not None:  # each document is cut into chunks of its own
            position = position - packed.first[:, :last]
        chunk = position // lifetime.length
        seen &= chunk[:, first:, None] == chunk[:, None, :]
    elif lifetime is not None:
        seen &= age < lifetime.length
    seen |= (columns == rows) & ~seen.any(-1, keepdim=True)  # a query before all tokens must see something: itself
    if packed is not None:
        seen &= packed.document[:, first:last, None] == packed.document[:, None, :last]
    mask = torch.zeros(B, 1, last - first, last, device=query.device).masked_fill(~seen[:, None], float("-inf"))
    if log_keep is None:
        return mask
    return torch.where((age > window)[:, None], mask + log_keep[:, :, None, :last], mask)


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=str(device))


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor | None,
    window: int,
    scale: float,
    packed: Packed | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    blocks = _causal_blocks(query.shape[2], query.device) if packed is None else packed.blocks
    score = None if log_keep is None else _forgetting(log_keep, window, group)
    # Past dynamo's limit, 8 by default, it would fall back to materialised scores without a word. Dynamo looks at it
    # when a call compiles, so it is raised for each call: set once, it is undone by whoever restores what was before.
    limit = max(COMPILATIONS, torch._dynamo.config.recompile_limit)
    with torch._dynamo.config.patch(recompile_limit=limit):
        out = _compiled()(query, key, value, score_mod=score, block_mask=blocks, enable_gqa=group > 1, scale=scale)
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _forgetting(log_keep: Tensor, window: int, group: int) -> Callable[..., Tensor]:
    """FlexAttention's form of the gate's mask."""
    # Flex turns -inf into NaN where a whole block is forgotten; -1e4 underflows to the same zero weight.
    log_keep = log_keep.clamp(min=-1e4)
    reach = torch.tensor(window, device=log_keep.device)  # a tensor, so that another window compiles nothing anew

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(q - k <= reach, s, s + log_keep[b, h // group, k])

    return score
