"""What a forward without a cache adds to scores past the window: `log_keep` [B, H, T] per layer.

Soft gates are for training. Hard gates say what eviction at inference does; caches are tested against them. At
temperature zero and without noise the soft form equals the hard one.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.dms.gate import Gates


class Policy(Protocol):
    """Decides, layer by layer, which tokens are forgotten once they are `window` tokens back."""

    window: int

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """[B, H, T] float32, at most 0, from the attention input [B, T, hidden] and keys [B, H, T, D]."""
        ...


class HardGates:
    """Marked tokens get -inf: what eviction does."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.window = gates.spec.eviction.window
        self.marked: list[Tensor] = []  # per layer [B, H, T] bool, the last forward's decisions

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """0 for kept tokens, -inf for marked ones."""
        if layer == 0:
            self.marked = []
        logits = read_shifted(self.gates.logits(layer, hidden), self.gates.spec.eviction.shift)
        self.marked.append(logits > 0)
        return torch.zeros_like(logits).masked_fill(logits > 0, float("-inf"))


class SoftGates:
    """Relaxed decisions for training: logits plus logistic noise, over a temperature.

    `logits` holds, per layer, the noisy logits [B, H, T] of the last forward, for the auxiliary loss.
    `generator` (on the model's device) draws the noise; None draws none.
    """

    def __init__(self, gates: Gates, temperature: float, generator: torch.Generator | None) -> None:
        self.gates = gates
        self.window = gates.spec.eviction.window
        self.temperature = temperature
        self.generator = generator
        self.logits: list[Tensor] = []

    def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
        """logsigmoid(-logit): the log of the probability that the token is kept."""
        if layer == 0:
            self.logits = []
        logits = self.gates.logits(layer, hidden)
        if self.generator is not None:
            shape = (logits.shape[0], self.gates.spec.outputs, logits.shape[2])
            u = torch.rand(shape, device=logits.device, generator=self.generator).clamp(1e-6, 1 - 1e-6)
            logits = logits + torch.log(u) - torch.log1p(-u)
        logits = read_shifted(logits / self.temperature, self.gates.spec.eviction.shift)
        self.logits.append(logits)
        return F.logsigmoid(-logits)


def read_shifted(logits: Tensor, shift: int) -> Tensor:
    """Move decisions [B, H, T] to the tokens they are about: with shift 1 token i's is read at i + 1.

    The newest token is then undecided, hence kept.
    """
    if shift == 0:
        return logits
    return F.pad(logits[..., shift:], (0, shift), value=-1e4)
