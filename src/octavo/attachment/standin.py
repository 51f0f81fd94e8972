"""What an attached model makes of an empty `DynamicCache`: the same object, which from now on answers as a `KVCache`.

So the idiom that hands one DynamicCache to `generate` turn after turn goes on where it stopped. A model that is not
attached gets NotAttachedError from its `update`: it would find none of the tokens that the cache counts. Once it is
empty again it is a DynamicCache as before, for any model.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from octavo.attachment.cache import KVCache


class BoundCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache whose tokens are in `octavo_cache`; a deep copy of it copies both.

    Its class is what changes, not its methods, so nothing in it refers back to itself and its pages are given back as
    soon as nobody has it any more.
    """

    octavo_cache: "KVCache"

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `PagedCache.update`; it refuses forwards of models that are not attached."""
        return self.octavo_cache.update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.octavo_cache.seen

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """See `PagedCache.get_mask_sizes`."""
        return self.octavo_cache.get_mask_sizes(query_length, layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `PagedCache.reorder_cache`."""
        self.octavo_cache.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `PagedCache.batch_select_indices`."""
        self.octavo_cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `PagedCache.batch_repeat_interleave`."""
        self.octavo_cache.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """See `PagedCache.crop`."""
        self.octavo_cache.crop(tokens_to_remove)
        release(self)

    def activate_past_recording(self) -> None:
        """See `KVCache.activate_past_recording`."""
        self.octavo_cache.activate_past_recording()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self.octavo_cache.reset()
        release(self)


def bind(past: Any, cache: "KVCache") -> None:
    """Make an empty DynamicCache stand for a KVCache."""
    past.__class__ = BoundCache
    past.octavo_cache = cache


def release(past: Any) -> None:
    """Make it a DynamicCache again, if it is a bound one and holds nothing."""
    bound: Any = past if type(past) is BoundCache else None
    if bound is not None and not bound.octavo_cache.is_initialized:
        del bound.octavo_cache
        bound.__class__ = DynamicCache
