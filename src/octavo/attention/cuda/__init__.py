"""Attention over pages in Triton: `decode` a few queries per sequence, `chunk` a piece of a prompt.

Triton comes with PyTorch for CUDA. Where it is missing, `octavo.attention.torch.padded` computes the same more slowly.
The two modules are imported where a kernel is first needed, since that takes a while.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BLOCK = 32  # slots of a row that are read at once


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return device.type == "cuda" and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def begins(length: Tensor) -> Tensor:
    """Where the blocks of each row begin when rows lie one after another, and how many there are in all.

    `length` [..., B, H] int32 of one layer or several; the result is [..., B * H + 1] int32. An empty row has a block
    too, so that somebody clears its output.
    """
    blocks = ((length + (BLOCK - 1)) // BLOCK).clamp(min=1).flatten(-2)
    return torch.nn.functional.pad(blocks.cumsum(-1, dtype=torch.int32), (1, 0))
