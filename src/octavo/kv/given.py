"""What callers of a cache give it, checked: numbers and token ids."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CacheStateError, InputError


def whole(numbers: Iterable[Any], what: str) -> list[int]:
    """Whole numbers that a caller gave, as ints. Raises CacheStateError for anything else."""
    try:
        return [operator.index(n) for n in numbers]
    except TypeError as e:
        raise CacheStateError(f"{what} must be whole numbers, not {numbers!r}") from e


def token_ids(tokens: Any) -> Tensor:
    """Token ids that a caller gave, a tensor or a list of them. Raises InputError for what is no whole number."""
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"tokens must be a tensor or list of token ids, not {type(tokens).__name__}") from e
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"tokens must be whole numbers, not {str(ids.dtype).removeprefix('torch.')}")
    return ids
