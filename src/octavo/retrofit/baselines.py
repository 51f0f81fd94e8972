"""Training-free ways to forget, at a given number of kept slots, for comparison with trained gates.

Each is a `Policy` for forwards without a cache. `kept` is the mean number of slots per KV head that it may
hold at the end of `length` tokens, recent ones included.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.dms import Policy

WINDOW = 256  # recent tokens that random and key-norm eviction leave alone, at most
SINKS = 4


def _window(kept: float) -> int:
    """Half of a small budget goes to recent tokens, at most `WINDOW` of them."""
    return max(1, min(WINDOW, int(kept) // 2))


def _drop_fraction(length: int, kept: float, window: int) -> float:
    """Share of tokens to mark so that unmarked ones plus the marked ones in the window are `kept`."""
    return min(1.0, max(0.0, (length - kept) / max(1, length - window)))


class SinksAndRecent:
    """Keep the first four tokens and the most recent ones (StreamingLLM, Xiao et al. 2023)."""

    def __init__(self, length: int, kept: float) -> None:
        self.window = min(length, max(1, round(kept) - SINKS))

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """-inf for all but the sinks."""
        keep = torch.full(key.shape[:3], float("-inf"), device=key.device)
        keep[:, :, :SINKS] = 0.0
        return keep


class KeyNorm:
    """Keep the keys of smallest L2 norm (Devoto et al. 2024), judged with the whole sequence at hand."""

    def __init__(self, length: int, kept: float) -> None:
        self.window = _window(kept)
        self.drop = _drop_fraction(length, kept, self.window)

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """-inf for the keys of largest norm, head by head."""
        norm = key.float().norm(dim=-1)
        threshold = norm.quantile(1.0 - self.drop, dim=-1, keepdim=True)
        return torch.zeros_like(norm).masked_fill(norm > threshold, float("-inf"))


class Random:
    """Forget tokens at random, head by head."""

    def __init__(self, length: int, kept: float, seed: int = 0) -> None:
        self.window = _window(kept)
        self.drop = _drop_fraction(length, kept, self.window)
        self.seed = seed

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """-inf with probability `drop`; the same for equal seeds, layers and shapes."""
        generator = torch.Generator(device=key.device).manual_seed(self.seed * 1009 + layer)
        marked = torch.rand(key.shape[:3], device=key.device, generator=generator) < self.drop
        return torch.zeros(key.shape[:3], device=key.device).masked_fill(marked, float("-inf"))


# By name; each is made for a length in tokens and the mean slots per KV head that it may hold.
BASELINES: dict[str, Callable[[int, float], Policy]] = {
    "sinks + recent": SinksAndRecent,
    "key norm": KeyNorm,
    "random": Random,
}
