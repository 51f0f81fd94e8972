"""The transformers `Cache` over sequences in pages: what `generate` asks of a cache, and nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from octavo.config import Eviction
from octavo.errors import CacheStateError, NotAttachedError
from octavo.kv.capture import snapshot_of
from octavo.kv.fused_step import Replayed
from octavo.kv.given import token_ids, whole
from octavo.kv.late import Late, capturing
from octavo.kv.memory import Memory, bookkeeping
from octavo.kv.recorded_chunk import RecordedChunk
from octavo.kv.sequences import Sequences, Step
from octavo.kv.shape import CacheShape
from octavo.kv.snapshot import Snapshot
from octavo.kv.tables import Tables


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of a batch of sequences, which may have any pages of a memory and share them with others."""

    def __init__(
        self, shape: CacheShape, eviction: Eviction | None, memory: Memory, budget: int | None = None, undo: int = 0
    ) -> None:
        super().__init__(layers=[])
        self.sequences = Sequences(shape, eviction, memory, budget, undo)
        self._masks = Late(shape.device)

    def become(self, shape: CacheShape, eviction: Eviction | None, memory: Memory) -> None:
        """Make an empty cache one of another shape."""
        assert not self.sequences.rows
        before = self.sequences
        self.sequences = Sequences(shape, eviction, memory, before.quota.budget, before.undo)
        self.sequences.adopt(before.boundaries)

    # What it holds

    @property
    def shape(self) -> CacheShape:
        """What it knows of the model."""
        return self.sequences.shape

    @property
    def eviction(self) -> Eviction | None:
        """When it forgets; None: never."""
        return self.sequences.eviction

    @property
    def memory(self) -> Memory:
        """The memory that it shares with the model's other caches."""
        return self.sequences.memory

    @property
    def tables(self) -> Tables:
        """The tables that hold the sequences."""
        return self.sequences.tables

    @property
    def rows(self) -> Sequence[int]:
        """The sequences' rows of `tables`, in the batch's order."""
        return self.sequences.rows

    @property
    def seen(self) -> int:
        """Columns read, padding included, as transformers counts."""
        return self.sequences.seen

    @property
    def position(self) -> Tensor:
        """Tokens read by each sequence, int32 [batch]: the next token's position."""
        return self.sequences.position

    @property
    def nbytes(self) -> int:
        """Bytes held for these sequences: the pages that they name, each counted once, their table rows, and what was
        kept for `keep`."""
        return self.sequences.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that transformers' `DynamicCache` would hold for the same tokens in the model's dtype."""
        s = self.shape
        return 2 * s.layers * s.kv_heads * s.head_dim * s.dtype.itemsize * len(self.rows) * self.seen

    @property
    @bookkeeping
    def kept(self) -> Tensor:
        """Slots that the next query can see, int64 [batch, KV layers, kv_heads]; of layers that attention reads."""
        if self.sequences.step is None:
            self.sequences.settle()
        return self.tables.visible(self.sequences.index)[:, : self.shape.read_layers]

    # One forward

    def check_batch(self, batch: int) -> None:
        """Raise CacheStateError where an input has another number of sequences."""
        if self.rows and batch != len(self.rows):
            raise CacheStateError(f"this cache holds {len(self.rows)} sequences, the input has {batch}")

    def begin(self, batch: int, columns: int, valid: Tensor | None, trains: bool = False) -> Step:
        """Open a forward; see `Sequences.begin`."""
        self._updated = 0
        return self.sequences.begin(batch, columns, valid, trains)

    def begin_capture(self, rows: Tensor, search: Tensor) -> Replayed:
        """Open a step that a CUDA graph captures; see `Sequences.begin_capture`."""
        self._updated = 0
        return self.sequences.begin_capture(rows, search)

    @contextmanager
    def recording(self, step: RecordedChunk) -> Iterator[None]:
        """Let a forward run on another step than the one that has begun, while a CUDA graph is captured."""
        before = self.sequences.step
        self._updated, self.sequences.step = 0, step
        try:
            yield
        finally:
            self.sequences.step = before

    @property
    def step(self) -> Step | RecordedChunk:
        """The running forward."""
        step = self.sequences.step
        assert step is not None
        assert not isinstance(step, Replayed)
        return step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take note that a layer's new keys and values [B, H, N, D] exist; returns them unchanged.

        transformers calls this before the attention function, which hands them to the running step.
        """
        if self.sequences.step is None or self._updated != layer_idx:
            raise NotAttachedError("octavo.KVCache works only with the attached model it was made for")
        self._updated += 1
        return key_states, value_states

    def commit(self, marked: Tensor | None = None) -> None:
        """End a forward that went well; see `Sequences.commit`. Raises NotAttachedError where layers are missing."""
        filled = self.step.filled
        if not self._updated == filled == self.shape.cached_layers:
            raise NotAttachedError(
                f"keys and values of {filled} of {self.shape.cached_layers} layers came; is the model attached, and "
                "does all of its attention go through transformers' attention interface?"
            )
        self.sequences.commit(marked)

    def abandon(self) -> None:
        """Take back a forward that failed or was interrupted; the cache is as it was before it."""
        self.sequences.abandon()

    def check_mask(self, mask: Tensor) -> None:
        """Raise CacheStateError where a mask [B, seen + n] of 0 and 1 hides or shows other columns than were read.

        On a GPU the answer to a decode step's mask comes with a later step, since the host does not wait for it.
        """
        if capturing(self.shape.device):
            return
        for answer, seen in self._masks.poll():
            self._refuse_mask(bool(answer), seen)
        before = mask[:, : self.seen].bool()
        real = self.sequences.real
        differs: Tensor = ~before.all() if real is None else (before != real).any()
        if mask.is_cuda and mask.shape[1] - self.seen == 1:
            self._masks.post(differs, self.seen)
        else:
            self._refuse_mask(bool(differs), self.seen)

    def _refuse_mask(self, differs: bool, seen: int) -> None:
        if differs:
            raise CacheStateError(
                f"the attention mask disagrees with the padding that this cache has read in its first {seen} columns; "
                "tokens that are cached cannot be hidden or shown again"
            )

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens per sequence, so that a decode step can be captured in a CUDA graph.

        Pass `position_ids` to the captured forward, and no mask. Nobody else gets this room until `replayed` has told
        of as many tokens or sequences leave. Waits for the device. Raises CacheBudgetError.
        """
        self.sequences.reserve(tokens)

    def replayed(self, steps: int) -> None:
        """Take note of `steps` tokens per sequence that a CUDA graph has read, before the next eager forward.

        Raises CacheStateError where sequences have joined or left the memory, or tables have grown, since the step was
        captured: then it has read them for nobody.
        """
        self.sequences.replayed(steps)

    # Boundaries

    def keep(self, boundaries: Iterable[int]) -> None:
        """Name boundaries that a snapshot will be asked for, before their tokens are read: columns, as `seen` counts.

        What a query sees only there is copied when it is reached; where a chunk cannot go past it (padding, codes in
        pages, not on the CPU) forwards are cut there. Without eviction, and at the end, nothing needs to be named.
        Raises CacheStateError for one that lies behind or is no whole number. What is copied counts in `nbytes`.
        """
        wanted = set(whole(boundaries, "boundaries"))
        if any(p <= self.seen for p in wanted):
            raise CacheStateError(f"boundary {min(wanted)} has been passed: {self.seen} columns are read already")
        self.sequences.boundaries.wanted |= wanted

    @bookkeeping
    def snapshot_under(
        self, identity: dict[str, Any], boundaries: Sequence[int] | None, sequence: int, tokens: Tensor | None
    ) -> Snapshot:
        """One sequence at some boundaries; see `octavo.attachment.cache.KVCache.snapshot`."""
        if not -len(self.rows) <= sequence < len(self.rows):
            raise CacheStateError(f"there is no sequence {sequence} in a cache of {len(self.rows)}")
        if self.sequences.step is not None:
            raise CacheStateError("a snapshot cannot be taken while a forward runs")
        self.sequences.settle()
        row, tails = self.rows[sequence], self.sequences.boundaries.of(self.rows[sequence])
        chosen = None if boundaries is None else whole(boundaries, "boundaries")
        ids = None if tokens is None else token_ids(tokens)
        return snapshot_of(self.tables, row, tails, chosen, self.sequences.shift, identity, ids)

    # Sequences

    def join(self, other: "PagedCache") -> None:
        """Take over all sequences of another cache, behind one's own; the other is empty then. Nothing is copied.

        The batch is as if shorter sequences had been padded on the left, so `position` says where each goes on. Raises
        CacheStateError where the other is of another model or mode.
        """
        self.sequences.take(other.sequences)

    def leave(self, indices: Sequence[int]) -> None:
        """End the sequences at `indices` of the batch and give their pages back; the others stay as they are.

        Leading columns that joining had made, padding in all that stay, go too: `seen` falls, and masks must be as much
        shorter. Raises CacheStateError where there is no such sequence.
        """
        there = range(len(self.rows))
        given = whole(indices, "sequences")
        for i in given:
            if not -len(there) <= i < len(there):
                raise CacheStateError(f"there is no sequence {i} in a cache of {len(there)}")
        gone = {there[i] for i in given}
        self.sequences.select([i for i in there if i not in gone])

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.sequences.reset()
        self._masks.forget()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices` (int64 [n]), in that order; a repeated one shares pages with its copies."""
        if self.rows:
            self.sequences.select(whole(indices.tolist() if isinstance(indices, Tensor) else indices, "sequences"))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences for beam search; a copied one shares its pages until it diverges."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times; copies share their pages until they diverge."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    @bookkeeping
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same tokens in a cache of its own, which shares pages with this one until they diverge."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        memo[id(self)] = twin
        twin._masks = Late(self.shape.device)
        twin.sequences = self.sequences.fork()
        return twin

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -n removes n columns, n > 0 keeps the first n (the older meaning), 0 none.

        Exact, or refused with the cache unchanged: CacheStateError where a token that would be seen again is gone, and
        CacheBudgetError where there is no room to copy a page that another cache has too.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if remove == 0 or not self.rows:
            return
        if remove > self.seen:
            raise CacheStateError(f"cannot remove {remove} tokens from a cache of {self.seen}")
        self.sequences.crop(remove)

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

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """-1: no fixed length."""
        return -1

    get_max_length = get_max_cache_shape

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        return len(self.rows) or -1

    max_batch_size = batch_size

    @property
    def is_compileable(self) -> bool:
        """False: pages are taken as they are needed."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a forward has begun."""
        return bool(self.rows)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can always undo; with eviction it only sometimes can."""
        return self.eviction is None and not self.shape.windowed

    @property
    def is_sliding(self) -> list[bool]:
        """No layer, as transformers sees it: all columns count, and windows are expiries."""
        return [False] * self.shape.layers
