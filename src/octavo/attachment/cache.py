"""The cache that users make: one attached model's, in one of its modes."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment.identity import difference, identity
from octavo.errors import CacheStateError, NotAttachedError
from octavo.kv import PagedCache, Snapshot

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment


class KVCache(PagedCache):
    """A transformers `Cache` for an attached model; pass it to `generate` or to the model as `past_key_values`.

    `nbytes`: bytes held; `dense_nbytes`: bytes a dense cache would hold; `kept`: visible slots, int64
    [batch, KV layers, kv_heads]. `budget` (bytes) bounds this cache, beside the one given to `attach`, which bounds
    all of them. `swiftkv` True or False makes every forward on this cache run with or without SwiftKV; None: as
    `set_swiftkv` says when the cache is first used. A cache holds one mode's keys and refuses the other. A forward
    that fails leaves it as it was, but with the chunks that went well where taking them back would need evicted tokens.
    """

    def __init__(self, model: PreTrainedModel, *, budget: int | None = None, swiftkv: bool | None = None) -> None:
        attachment: Attachment | None = model.__dict__.get("_octavo")
        if attachment is None:
            raise NotAttachedError(f"{type(model).__name__} is not attached; call octavo.attach(model) first")
        self.owner = attachment.key
        self._attachment = weakref.ref(attachment)  # a cache alone keeps no model alive
        self.fixed = swiftkv
        self.swiftkv_on = attachment.checked_mode(swiftkv)
        shape = attachment.modes.shape(self.swiftkv_on)
        super().__init__(shape, attachment.modes.eviction(self.swiftkv_on), attachment.memory(shape), budget)

    @classmethod
    def restore(
        cls, model: PreTrainedModel, snapshot: Snapshot, boundary: int | None = None, *, budget: int | None = None
    ) -> Self:
        """A cache that goes on where a snapshot's sequence was at a boundary, by default the last, in the same mode.

        The next token is the one at position `boundary`. `budget`: as for a new cache. Raises NotAttachedError,
        CacheBudgetError, and CacheStateError where the snapshot is of another model, adapter, mode or page type (the
        message names the first field in which they differ) or lacks the boundary.
        """
        swiftkv = snapshot.identity.get("swiftkv") is not None
        attachment: Attachment | None = model.__dict__.get("_octavo")
        has = attachment is not None and attachment.swiftkv is not None
        cache = cls(model, budget=budget, swiftkv=swiftkv if has else None)
        ours, theirs = cache.identity(), snapshot.identity
        name = difference(ours, theirs)
        if name is not None:
            raise CacheStateError(
                f"this snapshot was made under another {name}: {_short(theirs.get(name))}, and this model has "
                f"{_short(ours.get(name))}; attach the model, adapters and page type that it was made with"
            )
        cache.sequences.restore(snapshot, snapshot.boundaries[-1] if boundary is None else boundary)
        return cache

    def snapshot(
        self, boundaries: Sequence[int] | None = None, sequence: int = 0, tokens: Tensor | None = None
    ) -> Snapshot:
        """One sequence at some boundaries (numbers of its tokens), on the device of its pages; see `octavo.Snapshot`.

        `boundaries` by default are all that `keep` named and that have been reached, and the end, which is always to be
        had. `tokens` [n] of any integer dtype, n >= the last boundary: the ids that were read, for whoever restores.
        Waits for the device. Raises CacheStateError where a boundary was not kept or nothing was read.
        """
        return self.snapshot_under(self.identity(), boundaries, sequence, tokens)

    def identity(self) -> dict[str, Any]:
        """What the keys in this cache depend on beside the tokens (`octavo.attachment.identity`)."""
        attachment = self._attachment()
        if attachment is None:
            raise CacheStateError("the model that this KVCache was made for is gone")
        return identity(attachment, self.shape, self.swiftkv_on)

    def take_mode(self, attachment: "Attachment", mode: bool | None) -> None:
        """Make an empty cache one of the mode that a forward asks for; CacheStateError where it holds the other's."""
        wanted = self.fixed if mode is None and self.fixed is not None else attachment.checked_mode(mode)
        if self.swiftkv_on == wanted:
            return
        if self.is_initialized or self.fixed is not None:
            held, asked = ("with", "without") if self.swiftkv_on else ("without", "with")
            done = "filled" if self.is_initialized else "made"
            raise CacheStateError(f"this KVCache was {done} {held} SwiftKV and cannot go on {asked} it")
        self.swiftkv_on = wanted
        shape = attachment.modes.shape(wanted)
        self.become(shape, attachment.modes.eviction(wanted), attachment.memory(shape))


def _short(value: Any) -> str:
    """A field of an identity for people: digests are long."""
    return value[:12] if isinstance(value, str) else str(value)
