"""What gate training minimises beside the KL to the same model without eviction: the eviction still missing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_ratio(step: int, steps: int, final: float, ramp: float, start: float = 1.0) -> float:
    """The compression asked for at `step`: linear from `start` to `final`, there after the share `ramp`."""
    return start + (final - start) * min(1.0, step / max(1.0, steps * ramp))


def eviction_loss(logits: Sequence[Tensor], ratio: float) -> tuple[Tensor, Tensor]:
    """(max(0, target fraction - evicted fraction), evicted fraction), both scalars.

    Decisions are thresholded at 0.5 with a straight-through gradient; `logits` are per layer [B, H, T].
    """
    soft = torch.sigmoid(torch.stack(list(logits)))
    hard = (soft > 0.5).float() - soft.detach() + soft
    evicted = hard.mean()
    return torch.clamp(1.0 - 1.0 / ratio - evicted, min=0.0), evicted.detach()
