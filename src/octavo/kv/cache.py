"""The transformers `Cache` over pages: the protocol of one forward, and what `generate` asks of a cache.

A store is one set of keys and values: one per layer, or one for several layers that share it. A forward goes:
`begin` (positions of the new tokens), then per store `update` (its keys and values are held back) and `mark`
(when they expire), per layer `attend` (attention over the pages and the held-back tokens), and after the last
layer `commit`, which writes the survivors of all stores at once. So a chunk's tokens that expire before the next
query never reach a page, bookkeeping costs a few tensor operations per forward and not per layer, and a
forward that fails leaves the cache as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from octavo.attention import paged_attention
from octavo.attention.ragged import first_chunk_attention
from octavo.config import NEVER, CacheSettings, Eviction
from octavo.errors import CacheStateError, NotAttachedError
from octavo.kv.open_marks import OpenMarks
from octavo.kv.pool import PagePool
from octavo.kv.rows import Rows

Method = TypeVar("Method", bound=Callable[..., Any])


def bookkeeping(method: Method) -> Method:
    """No gradients, and nothing made in inference mode: such a page could never be written outside it again."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@dataclass(frozen=True)
class CacheShape:
    """What a cache must know of a model. `dtype` is how slots are stored; `layers` may share `stores`."""

    layers: int
    stores: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Forward:
    """The tokens of the running forward: filled by `begin`, `update` and `mark`, consumed by `commit`."""

    valid: Tensor | None  # [B, N] bool, None: no padding
    position: Tensor  # [B, N] int32, -1 is padding
    now: Tensor  # [B] int64, position of the next query after this forward
    mortal: Tensor  # [B, 1, N] int32, expiry of a marked token
    never: Tensor  # [B, H, N] int32, all NEVER
    plain: bool  # nothing is cached, nothing is padded and nothing can expire within this chunk
    late: bool  # one token, which sees itself whatever its mark: marks may wait for `commit`
    host_length: list[list[list[int]]]  # [L][B][H] slots in use, read once for all stores
    keys: list[Tensor] = field(default_factory=list)  # per store [B, H, N, D]
    values: list[Tensor] = field(default_factory=list)
    expiry: list[Tensor] = field(default_factory=list)  # per store [B, H, N] int32


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of one batch of sequences, all stores (L of them), on pages that eviction frees."""

    def __init__(self, shape: CacheShape, eviction: Eviction | None, settings: CacheSettings) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.eviction = eviction
        self.settings = settings
        self.reset()

    @bookkeeping
    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.rows: Rows | None = None
        self.position = torch.zeros(0, dtype=torch.int64, device=self.shape.device)  # [B] real tokens seen
        self.seen = 0  # columns seen, padding included, as transformers counts
        self._forward: Forward | None = None
        self._open: OpenMarks | None = None  # shift 1 only
        self._real: Tensor | None = None  # [B, seen] bool, which columns are no padding; None: all of them
        self._cropped = False

    # What it holds

    @property
    def nbytes(self) -> int:
        """Bytes allocated for the cache: pages, free or in use, and all bookkeeping."""
        own = [self.position] + ([] if self._real is None else [self._real])
        parts = (self.rows, self._open)
        return sum(t.numel() * t.element_size() for t in own) + sum(part.nbytes for part in parts if part)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that transformers' `DynamicCache` would hold for the same tokens in the same dtype."""
        s = self.shape
        return 2 * s.layers * s.kv_heads * s.head_dim * s.dtype.itemsize * len(self.position) * self.seen

    @property
    def kept(self) -> Tensor:
        """Slots that the next query can see, int64 [batch, stores, kv_heads]; layers that share a store count once."""
        if self.rows is None:
            return torch.zeros(0, self.shape.stores, self.shape.kv_heads, dtype=torch.int64)
        return self.rows.live(self.position).transpose(0, 1)

    # One forward

    @bookkeeping
    def begin(self, batch: int, columns: int, valid: Tensor | None) -> None:
        """Open a forward of `columns` tokens per sequence; `valid` [B, N] bool marks the real ones."""
        if self.rows is None:
            s, c = self.shape, self.settings
            pool = PagePool(s.head_dim, s.dtype, s.device, c.page_size, c.budget)
            self.rows = Rows(pool, s.stores, batch, s.kv_heads)
            self.position = torch.zeros(batch, dtype=torch.int64, device=s.device)
            if self.eviction is not None and self.eviction.shift:
                self._open = OpenMarks(self.rows)
        elif batch != len(self.position):
            raise CacheStateError(f"this cache holds {len(self.position)} sequences, the input has {batch}")
        if valid is None:
            position = self.position[:, None] + torch.arange(columns, device=self.position.device)
            now = self.position + columns
        else:
            position = (self.position[:, None] + valid.cumsum(1) - 1).masked_fill(~valid, -1)
            now = self.position + valid.sum(1)
        window = self.eviction.window if self.eviction else 0
        plain = self.seen == 0 and valid is None and (self.eviction is None or columns <= window + 1)
        position = position.int()
        self._forward = Forward(
            valid,
            position,
            now,
            (position + window)[:, None],
            torch.full((batch, self.shape.kv_heads, columns), NEVER, dtype=torch.int32, device=position.device),
            plain,
            columns == 1,
            self.rows.length.tolist(),
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hold back one store's new keys and values [B, H, N, D] until `commit`; returns them unchanged."""
        forward = self._forward
        if forward is None or not (len(forward.keys) == len(forward.expiry) == layer_idx):
            self._forward = None
            raise NotAttachedError("octavo.KVCache works only with the attached model it was made for")
        forward.keys.append(key_states)
        forward.values.append(value_states)
        return key_states, value_states

    def mark(self, store: int, marked: Tensor | None) -> None:
        """Say when the new tokens of one store expire: `marked` [B, H, N] bool is the gate's decision at each token.

        None where nothing is evicted, and where `late` says that the marks of all stores may come with `commit`.
        """
        forward = self._forward
        assert forward is not None
        assert len(forward.keys) == store + 1 == len(forward.expiry) + 1
        expiry = forward.never
        if marked is not None:
            expiry = self._expiry(slice(store, store + 1), marked[None], forward)[0]
        forward.expiry.append(expiry)

    def attend(self, store: int, query: Tensor, scale: float) -> Tensor:
        """Attention of one layer over a marked store, [B, n, Hq, D]; `query` [B, Hq, n, D] of the last n new tokens."""
        forward, rows = self._forward, self.rows
        assert forward is not None
        assert rows is not None
        key, value, expiry = forward.keys[store], forward.values[store], forward.expiry[store]
        if forward.plain:
            return first_chunk_attention(query, key, value, scale)
        pool = rows.pool
        past = (pool.k, pool.v, pool.position, pool.expiry, rows.table[store], rows.length[store])
        return paged_attention(query, key, value, forward.position, expiry, *past, forward.host_length[store], scale)

    @property
    def late(self) -> bool:
        """Whether `commit` takes the running forward's marks: one operation for all stores, not one per store."""
        return self._forward is not None and self._forward.late

    @bookkeeping
    def commit(self, marked: Tensor | None = None) -> None:
        """Write the survivors of all stores; `marked` [L, B, H, N] bool gives the marks that `mark` did not get.

        Raises CacheBudgetError with the cache as it was.
        """
        forward, rows = self._forward, self.rows
        self._forward = None
        assert forward is not None
        assert rows is not None
        if len(forward.expiry) != self.shape.stores:
            raise NotAttachedError(
                f"{len(forward.expiry)} of {self.shape.stores} stores were filled; is the model attached?"
            )
        window = self.eviction.window if self.eviction else 0
        columns = forward.position.shape[1]
        expired = self._cropped or (self.eviction is not None and self.seen + columns > window)
        everything = slice(0, self.shape.stores)
        try:
            slot = rows.write(
                torch.stack(forward.keys),
                torch.stack(forward.values),
                forward.position,
                torch.stack(forward.expiry) if marked is None else self._expiry(everything, marked, forward),
                forward.now,
                expired,
                padded=forward.valid is not None,
            )
        except BaseException:
            self.abandon()
            raise
        if self._open is not None:
            self._open.move(slot, forward.position)
        if self._real is not None or forward.valid is not None:
            self._real = torch.cat([self._columns(), forward.position >= 0], 1)
        self.position = forward.now
        self.seen += columns

    @bookkeeping
    def abandon(self) -> None:
        """Drop a forward that failed; the cache stays as it was before it."""
        self._forward = None
        if self._open is not None:
            self._open.undo()
        if self.seen == 0:
            self.reset()

    @bookkeeping
    def _expiry(self, stores: slice, marked: Tensor, forward: Forward) -> Tensor:
        """When the new tokens of some stores expire, [l, B, H, N] int32, from their marks [l, B, H, N]."""
        if self._open is not None:
            window = self.eviction.window if self.eviction else 0
            marked = self._open.settle(stores, marked, forward.position, self.position - 1 + window)
        return torch.where(marked.contiguous(), forward.mortal, forward.never)

    def check_mask(self, mask: Tensor) -> None:
        """Raise CacheStateError where a mask [B, seen + n] of 0 and 1 hides or shows other columns than were read."""
        if not torch.equal(mask[:, : self.seen].bool(), self._columns()):
            raise CacheStateError(
                "the attention mask disagrees with the padding that this cache has read; tokens that are cached "
                "cannot be hidden or shown again"
            )

    def _columns(self) -> Tensor:
        """Which columns seen are no padding, [B, seen] bool."""
        if self._real is not None:
            return self._real
        return torch.ones(len(self.position), self.seen, dtype=torch.bool, device=self.position.device)

    # What transformers asks of a cache

    def __len__(self) -> int:
        return self.shape.layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.seen}, nbytes={self.nbytes}, dense_nbytes={self.dense_nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(columns after this forward, 0); older transformers passes the columns' positions instead of a count."""
        columns = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + columns, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no fixed length."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no fixed length."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        return len(self.position) if self.rows is not None else -1

    max_batch_size = batch_size

    @property
    def is_compileable(self) -> bool:
        """False: pages are taken as they are needed."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a forward has begun."""
        return self.rows is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can always undo; with eviction it only sometimes can."""
        return self.eviction is None

    @property
    def is_sliding(self) -> list[bool]:
        """No layer slides."""
        return [False] * self.shape.layers

    @bookkeeping
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -n removes n columns, n > 0 keeps the first n (the older meaning), 0 none.

        Exact or refused: CacheStateError, with the cache unchanged, when a token that would be visible again is
        already evicted.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if remove == 0 or self.rows is None:
            return
        if remove > self.seen:
            raise CacheStateError(f"cannot remove {remove} tokens from a cache of {self.seen}")
        if remove == self.seen:
            self.reset()
            return
        now = self.position - self._columns()[:, -remove:].sum(1)
        self.rows.crop(now)
        if self._open is not None:
            self._open.reopen(now)
        if self._real is not None:
            self._real = self._real[:, :-remove]
        self.position = now
        self.seen -= remove
        self._cropped = True

    @bookkeeping
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices` (int64 [n]), in that order; a repeated one is copied."""
        if self.rows is None:
            return
        indices = indices.to(self.position.device)
        self.rows.select(indices)
        self.position = self.position[indices]
        if self._open is not None:
            self._open.select(indices)
        if self._real is not None:
            self._real = self._real[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences for beam search; pages are copied, since each belongs to one sequence."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.position)).repeat_interleave(repeats))
