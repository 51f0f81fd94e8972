"""The cache that users make: one attached model's, in one of its modes."""

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment.identity import FORMAT, difference, identity
from octavo.attachment.layout import joined
from octavo.attachment.settings import byte_budget
from octavo.attachment.states import InPages, States
from octavo.config import UNDO
from octavo.errors import CacheStateError, NotAttachedError
from octavo.kv import PagedCache, Snapshot
from octavo.kv.late import Late, capturing

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment


class KVCache(PagedCache):
    """A transformers `Cache` for an attached model; pass it to `generate` or to the model as `past_key_values`.

    `nbytes`: bytes held; `dense_nbytes`: bytes a dense cache would hold; `kept`: visible slots, int64
    [batch, KV layers, kv_heads]. `budget` (bytes) bounds this cache, beside the one given to `attach`, which bounds
    all of them. `swiftkv` True or False makes every forward on this cache run with or without SwiftKV; None: as
    `set_swiftkv` says when the cache is first used. A cache holds one mode's keys and refuses the other. A forward
    that fails leaves it as it was, but with the chunks that went well where taking them back would need evicted tokens.

    Where a forward gets no `position_ids`, tokens stand where they are in their own sequence, padding aside. A cache
    that was read at other `position_ids` goes on with those alone: it refuses `snapshot` and `join`.

    Raises NotAttachedError, ConfigError for an impossible budget or mode, and CacheStateError where `attach` was given
    a budget and the model has moved to another dtype or device while caches of the one before hold tokens.
    """

    approximate = False  # whether it was put together from similar prompts; then nothing of it is ever stored
    drafts = False  # whether `generate` drafts on it now: several tokens are then the next ones, not a prompt

    def __init__(self, model: PreTrainedModel, *, budget: int | None = None, swiftkv: bool | None = None) -> None:
        attachment = _joined(model)
        if attachment is None:
            raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
        self.owner = attachment.key
        self._attachment = weakref.ref(attachment)  # a cache alone keeps no model alive
        self.fixed = swiftkv
        self.swiftkv_on = attachment.checked_mode(swiftkv)
        shape = attachment.modes.shape(self.swiftkv_on)
        eviction, memory = attachment.modes.eviction(self.swiftkv_on), attachment.memory(shape)
        super().__init__(shape, eviction, memory, byte_budget(budget), attachment.settings.undo or 0)
        layout = attachment.layout
        self._kv_layer = {layer: i for i, layer in enumerate(layout.stores)}
        self._shapes = layout.shapes[: shape.cached_layers]
        self.states = States(attachment.model.config) if layout.states else None
        self._list_layers(attachment.model.config.num_hidden_layers)
        self._set_moved(None)

    @classmethod
    def restore(
        cls, model: PreTrainedModel, snapshot: Snapshot, boundary: int | None = None, *, budget: int | None = None
    ) -> Self:
        """A cache that goes on where a snapshot's sequence was at a boundary, by default the last, in the same mode.

        The next token is the one at position `boundary`. `budget`: as for a new cache. Raises NotAttachedError,
        CacheBudgetError, and CacheStateError where the snapshot is of another model, adapter, mode or page type (the
        message names the first field in which they differ) or lacks the boundary.
        """
        if not isinstance(snapshot, Snapshot):
            raise CacheStateError(
                f"restore takes an octavo.Snapshot, not {type(snapshot).__name__}; see Snapshot.load and from_bytes"
            )
        swiftkv = snapshot.identity.get("swiftkv") is not None
        attachment = _joined(model)
        has = attachment is not None and attachment.swiftkv is not None
        cache = cls(model, budget=budget, swiftkv=swiftkv if has else None)
        ours, theirs = cache.identity(), snapshot.identity
        name = difference(ours, theirs)
        if name == "format":
            raise CacheStateError(
                f"this snapshot says what it was made under in format {theirs.get(name)}, and this version of Octavo "
                f"knows format {FORMAT}; read its text again"
            )
        if name is not None:
            called, held, wanted = _CALLED.get(name, name), _short(theirs.get(name)), _short(ours.get(name))
            raise CacheStateError(
                f"this snapshot was made under another {called}: {held}, and this model has {wanted}; attach the "
                "model, adapters and page type that it was made with"
            )
        boundary = snapshot.boundaries[-1] if boundary is None else boundary
        cache.sequences.restore(snapshot.layout, snapshot.at(boundary), boundary)
        if cache.states is not None:
            cache.states.load(snapshot.states, cache.shape.device)
        return cache

    def snapshot(
        self, boundaries: Sequence[int] | None = None, sequence: int = 0, tokens: Tensor | None = None
    ) -> Snapshot:
        """One sequence at some boundaries (numbers of its tokens), on the device of its pages; see `octavo.Snapshot`.

        `boundaries` by default are all that `keep` named and that have been reached, and the end, which is always to be
        had. `tokens` [n] of any integer dtype, n >= the last boundary: the ids that were read, for whoever restores.
        Waits for the device. Raises CacheStateError where a boundary was not kept, nothing was read, or what was read
        stood at other `position_ids` than the numbers of its tokens, at which `restore` goes on.
        """
        if self.states is not None and (boundaries is not None and list(boundaries) != [int(self.position[sequence])]):
            raise CacheStateError(f"a snapshot holds this cache at its end alone: {_STATEFUL}")
        if self.moved is not None and bool(self.moved):
            raise CacheStateError(f"a snapshot cannot hold this cache: {_MOVED}")
        taken = self.snapshot_under(self.identity(), boundaries, sequence, tokens)
        return taken if self.states is None else replace(taken, states=self.states.tensors(sequence))

    def keep(self, boundaries: Iterable[int]) -> None:
        """Name boundaries that a snapshot will be asked for; see `PagedCache.keep`. States cannot be kept."""
        if self.states is not None:
            raise CacheStateError(f"boundaries within a text cannot be kept: {_STATEFUL}")
        super().keep(boundaries)

    @property
    def attachment(self) -> "Attachment":
        """What joined its model. Raises CacheStateError where that is gone."""
        attachment = self._attachment()
        if attachment is None:
            raise CacheStateError("the model that this KVCache was made for is gone")
        return attachment

    def identity(self) -> dict[str, Any]:
        """What the keys in this cache depend on beside the tokens (`octavo.attachment.identity`)."""
        return identity(self.attachment, self.shape, self.swiftkv_on)

    def take_mode(self, attachment: "Attachment", mode: bool | None) -> None:
        """Make an empty cache one of the mode that a forward asks for, and of the memory that the model has now.

        Raises CacheStateError where it holds the other mode's keys.
        """
        wanted = self.fixed if mode is None and self.fixed is not None else attachment.checked_mode(mode)
        if self.swiftkv_on != wanted and (self.is_initialized or self.fixed is not None):
            held, asked = ("with", "without") if self.swiftkv_on else ("without", "with")
            done = "filled" if self.is_initialized else "made"
            raise CacheStateError(f"this KVCache was {done} {held} SwiftKV and cannot go on {asked} it")
        if self.is_initialized:
            return
        shape = attachment.modes.shape(wanted)
        memory = attachment.memory(shape)
        if self.swiftkv_on != wanted or self.memory is not memory:
            self.swiftkv_on = wanted
            self.become(shape, attachment.modes.eviction(wanted), memory)
            self._masks = Late(shape.device)
        self._set_moved(None)

    def activate_past_recording(self, tokens: int = UNDO) -> None:
        """Prepare for drafts of so many tokens, which `generate` takes back in part; see `undo` of `octavo.attach`."""
        if self.attachment.settings.undo is None:
            self.sequences.settle()
            self.sequences.reach_back(tokens)

    @property
    def undo(self) -> int:
        """How many tokens `crop` can always take back, of those that were read since it has been so many."""
        return self.sequences.undo

    # Layers that have a state of their own

    def _list_layers(self, count: int) -> None:
        """What transformers finds as the cache's layers: those with a state, and something that stands for the rest."""
        self.layers = [self.states.layers.get(i, InPages()) for i in range(count)] if self.states else []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `PagedCache.update`; `layer_idx` counts the model's layers."""
        return super().update(key_states, value_states, self._kv_layer.get(layer_idx, layer_idx))

    def begin(self, batch: int, columns: int, valid: Tensor | None, trains: bool = False) -> Any:
        """Open a forward; see `PagedCache.begin`."""
        step = super().begin(batch, columns, valid, trains)
        if self.states is not None:
            self.states.begin()
        return step

    def commit(self, marked: Tensor | None = None) -> None:
        """End a forward that went well; see `PagedCache.commit`."""
        super().commit(marked)
        if self.states is not None:
            self.states.commit()

    def abandon(self) -> None:
        """Take back a forward that failed; see `PagedCache.abandon`."""
        if self.states is not None:
            self.states.abandon()
        super().abandon()

    def leave(self, indices: Sequence[int]) -> None:
        """End sequences; see `PagedCache.leave`."""
        there = range(len(self.rows))
        super().leave(indices)
        if self.states is not None:
            gone = {there[i] for i in indices}
            self.states.select([i for i in there if i not in gone])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences; see `PagedCache.batch_select_indices`."""
        there = len(self.rows)
        super().batch_select_indices(indices)
        if self.states is not None and there:
            self.states.select([int(i) for i in indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; see `PagedCache.crop`. Where layers have a state, all or none can be removed."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if self.states is not None and 0 < remove < self.seen:
            raise CacheStateError(
                "tokens cannot be taken back: this model has layers with a state that has gone on, as in linear "
                "attention; drafts and `crop` need a model whose layers all attend"
            )
        super().crop(tokens_to_remove)
        if self.states is not None and not self.seen:
            self.states.reset()

    @property
    def nbytes(self) -> int:
        """Bytes held for these sequences, states included; see `PagedCache.nbytes`."""
        return super().nbytes + (self.states.nbytes if self.states is not None else 0)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that transformers' `DynamicCache` would hold for the same tokens in the model's dtype, states included.

        It keeps the last tokens of a window.
        """
        shape, total = self.shape, 0
        if self.states is None and not shape.windowed:
            return super().dense_nbytes
        for (heads, key, value), life in zip(self._shapes, shape.lifetimes, strict=True):
            total += heads * (key + value) * (self.seen if life is None else min(self.seen, life.length - 1))
        states = self.states.nbytes if self.states is not None else 0
        return total * len(self.rows) * shape.dtype.itemsize + states

    def __len__(self) -> int:
        return len(self.layers) or super().__len__()

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have a state and no keys."""
        states = self.states.layers if self.states is not None else {}
        return [i in states and i not in self._kv_layer for i in range(len(self))]

    @property
    def is_sliding(self) -> list[bool]:
        """No layer, as transformers sees it: all columns count, and windows are expiries."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """No layer: what stands for those in pages is none."""
        return [False] * len(self)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can always undo."""
        return super().is_croppable and self.states is None

    # Positions that are not the tokens' own

    def _set_moved(self, moved: Tensor | None) -> None:
        self.moved = moved  # [] bool on the device: whether any token stood elsewhere than at its own number; None: no
        self._joined = Late(self.shape.device)  # the same of what was joined, for a host that does not wait
        self._refused = False

    def moved_by(self, position_ids: Tensor) -> Tensor | None:
        """What `moved` is after the running step, whose tokens stand at `position_ids` ([N], [B, N], [axes, B, N])."""
        if capturing(self.shape.device):
            return self.moved
        new = self.sequences.new
        differs = position_ids != new.position
        if new.padded:
            differs = differs & (new.position >= 0)
        return differs.any() if self.moved is None else self.moved | differs.any()

    def join(self, other: PagedCache) -> None:
        """Take over all sequences of another cache, behind one's own; the other is empty then. Nothing is copied.

        The batch is as if shorter sequences had been padded on the left; forwards without `position_ids` go on at each
        sequence's own `position`. Raises CacheStateError where the other is of another model or mode, or where either
        was read at other `position_ids` than the numbers of its tokens; on CUDA that may come with a later forward.
        """
        moved = [c.moved for c in (self, other) if isinstance(c, KVCache) and c.rows and c.moved is not None]
        both = None if not moved else moved[0] if len(moved) == 1 else moved[0] | moved[1]
        if both is not None and not both.is_cuda and bool(both):
            raise CacheStateError(f"these caches cannot run as one batch: {_MOVED}")
        super().join(other)
        if self.states is not None and isinstance(other, KVCache) and other.states is not None:
            self.states.take(other.states)
        self.moved = both
        if both is not None and both.is_cuda:
            self._joined.post(both, None)

    def check_joined(self) -> None:
        """Raise CacheStateError where what `join` could not know without waiting has come: that it was wrong."""
        if not capturing(self.shape.device):
            self._refused = self._refused or any(moved for moved, _ in self._joined.poll())
        if self._refused:
            raise CacheStateError(f"caches were joined that cannot run as one batch: {_MOVED}")

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        if self.states is not None:
            self.states.reset()
        self._set_moved(None)
        self.approximate = False

    # Copies

    def __copy__(self) -> Self:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same tokens in a cache of its own, which shares pages with this one until they diverge."""
        twin = super().__deepcopy__(memo)
        twin._joined = Late(self.shape.device)
        if self.states is not None:
            twin.states = self.states.copy()
            twin._list_layers(len(self.layers))
        return twin

    def __reduce__(self) -> NoReturn:
        raise CacheStateError(
            "a KVCache cannot be pickled: its pages lie in its model's memory; pickle or save what its snapshot() gives"
        )


# Fields of an identity whose names say too little.
_CALLED = {"modules": "set of its modules' settings", "kv_layers": "kv_layers (one more where tokens hand on)"}
_STATEFUL = "its model has layers with a state, as in linear attention, which is there for the last token read alone"
_MOVED = "its tokens were read at other position_ids than their numbers in the sequence, and nothing tells which"


def _joined(model: PreTrainedModel) -> "Attachment | None":
    """What `attach` joined to a model or to the language model inside it."""
    found: Attachment | None = model.__dict__.get("_octavo") or joined(model).__dict__.get("_octavo")
    return found


def _short(value: Any) -> str:
    """A field of an identity for people: digests are long."""
    return value[:12] if isinstance(value, str) else str(value)
