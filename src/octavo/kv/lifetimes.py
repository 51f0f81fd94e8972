"""When tokens expire by their layer's own window: sliding, chunked and full layers of one model side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention import Lifetime
from octavo.config import NEVER


class Lifetimes:
    """Those of all KV layers, None where a layer attends to everything, as tensors on one device.

    `heads`: how many of the most heads each layer has, empty where all have as many. The heads that a layer lacks hold
    one token, which expires at once.
    """

    def __init__(self, each: Sequence[Lifetime | None], device: torch.device, heads: Sequence[int] = ()) -> None:
        self.each = tuple(each)
        length = [1 if life is None else life.length for life in each]
        self._length = torch.tensor(length, dtype=torch.int32, device=device)[:, None]  # [L, 1]
        self._full = torch.tensor([life is None for life in each], device=device)[:, None]
        self._chunked = torch.tensor([life is not None and life.chunked for life in each], device=device)[:, None]

        self._lacking = None
        if heads:
            number = torch.arange(max(heads), device=device)
            self._lacking = (number >= torch.tensor(heads, device=device)[:, None])[..., None]  # [L, H, 1]

    @property
    def longest(self) -> int:
        """Tokens that a window shows at most."""
        return max((life.length for life in self.each if life is not None), default=1)

    def expiry(self, position: Tensor, layers: slice = slice(None)) -> Tensor:
        """Until when tokens at `position` [B, N] int32 are visible in some layers, int32 [B, l, 1 or H, N]."""
        length, at = self._length[layers], position[:, None]
        first = torch.where(self._chunked[layers], at // length * length, at)
        until = torch.where(self._full[layers], NEVER, first + length - 1).int()[:, :, None]
        return until if self._lacking is None else torch.where(self._lacking[layers], at[:, :, None], until)
