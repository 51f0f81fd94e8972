"""Where the tokens of a forward stand: what masks and `position_ids` must look like, and what they are without any.

transformers counts columns where it gets no `position_ids`, padding included; Octavo's visibility rule and its
snapshots count tokens. So where the two may differ, Octavo gives the model the tokens' own positions.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo.attention import Packed
from octavo.errors import CacheStateError, PromptError, UnsupportedModelError
from octavo.kv.late import capturing

if TYPE_CHECKING:
    from octavo.attachment.cache import KVCache


def padding(mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of the new tokens are real, [B, columns] bool, from a 2-D mask that ends with them; None: all are.

    On a GPU a single column is not looked at, since the host would have to wait for the answer in every decode step.
    """
    if mask is None or mask.ndim != 2:
        return None
    new = mask[:, -columns:].bool()
    if (mask.is_cuda and columns == 1) or torch.compiler.is_compiling():
        return new
    return None if bool(new.all()) else new


def check_shapes(kwargs: dict[str, Any], batch: int, seen: int, columns: int) -> None:
    """Raise PromptError for a mask or positions of another shape than the input's, CacheStateError where a mask is
    neither of the `seen` columns of a cache and the new ones nor of these alone, and UnsupportedModelError for a mask
    that is not one tensor.

    A mask of four dimensions is refused elsewhere, by what attention computes.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, dict):
        raise UnsupportedModelError("masks made beforehand are not supported; pass a 2-D padding mask")
    if isinstance(mask, Tensor) and mask.ndim == 3:  # which transformers would pass by; it hands down those of four
        raise UnsupportedModelError("3-D attention masks are not supported; pass a 2-D padding mask")
    fitting = (batch, seen + columns), (batch, columns)
    if isinstance(mask, Tensor) and mask.ndim in (1, 2) and mask.shape not in fitting:
        found = f"the attention mask has shape {list(mask.shape)}; expected {list(fitting[0])}"
        if not seen:
            raise PromptError(f"{found}, one row per sequence")
        raise CacheStateError(
            f"{found}, one row per sequence: {seen} columns of the cache and {columns} new ones; or the new ones alone"
        )
    if not isinstance(positions, Tensor):
        return
    shape = tuple(positions.shape)  # [N], [B, N], or where pictures have several axes [axes, B, N]
    if not 1 <= len(shape) <= 3 or shape[-1] != columns or (len(shape) > 1 and shape[-2] not in (1, batch)):
        raise PromptError(f"position_ids have shape {list(shape)}; expected [{batch}, {columns}]")


def check_length(limit: int | None, cache: "KVCache", columns: int, valid: Tensor | None) -> None:
    """Raise PromptError where an input of several tokens goes past the positions that the model has.

    Padding takes none. It is counted, which waits for the device, only where the columns would be too many. Decoding
    goes on past them, by drafts as by single tokens.
    """
    if columns == 1 or limit is None or cache.seen + columns <= limit or (cache.drafts and cache.seen):
        return
    longest = cache.seen + columns
    padded = valid is not None or cache.sequences.real is not None
    if padded and not capturing(cache.shape.device):
        new = columns if valid is None else valid.sum(1)
        longest = int((cache.position + new).max() if cache.rows else torch.as_tensor(new).max())
    if longest > limit:
        raise PromptError(f"the prompt has {longest:,} tokens, the model has {limit:,} positions; shorten it")


def packed(kwargs: dict[str, Any], batch: int) -> Packed | None:
    """The documents of rows that are packed, None: there is one in each row.

    As in transformers a document begins where `position_ids` do not go on by one, in a forward without mask or cache.
    """
    given = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or not isinstance(given, Tensor):
        return None
    text = given[0] if given.ndim == 3 and given.shape[0] == 4 else given  # beside three axes of pictures
    if text.ndim != 2:
        return None
    document = (text.diff(dim=1, prepend=text[:, :1] - 1) != 1).cumsum(1).int()
    if not torch.compiler.is_compiling() and not bool(document[:, -1].any()):
        return None
    return Packed(document.expand(batch, -1))


def of_tokens(valid: Tensor) -> Tensor:
    """Positions [B, N] int64 of the first columns of sequences, of which `valid` [B, N] bool are tokens.

    Padding, whose logits nobody should use, stands at its column as in transformers.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, valid.cumsum(1) - 1, columns)


def next_in(cache: "KVCache", valid: Tensor | None) -> Tensor | None:
    """The same of the step that has begun; None: each token's position is its column.

    Computed on the device, so a CUDA graph can hold it; there a number from the host would stay what it was.
    """
    new, captured = cache.sequences.new, capturing(cache.shape.device)
    goes_on = cache.states is not None and cache.seen > 0  # Bamba counts each input's tokens from 0
    if valid is None and cache.sequences.real is None and not captured and not goes_on:
        return None
    if not new.padded:
        return new.position.long()
    columns = torch.arange(cache.seen, cache.seen + new.position.shape[1], device=new.position.device)
    return torch.where(new.position >= 0, new.position, columns)
