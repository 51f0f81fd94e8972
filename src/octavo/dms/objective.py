"""What gate training minimises beside the KL to the same model without eviction: the eviction still missing
(Lancucki et al., NeurIPS 2025).

It is taken of each micro-batch on its own, not of the whole step: a hinge of the step's fraction would need the
decisions of all its micro-batches before the first gradient. A step is thus pushed by the micro-batches that evict
too little, even where the others make up for them, and smaller micro-batches end slightly past the target.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_ratio(step: int, steps: int, final: float, ramp: float, start: float = 1.0) -> float:
    """The compression asked for at `step` of `steps`, in tokens per kept token.

    It rises linearly from `start` and stays at `final` after the share `ramp` of the steps.
    """
    return start + (final - start) * min(1.0, step / max(1.0, steps * ramp))


def eviction_loss(logits: Sequence[Tensor], ratio: float) -> tuple[Tensor, Tensor]:
    """(max(0, target fraction - evicted fraction), evicted fraction) of one micro-batch, both scalars.

    Decisions are thresholded at 0.5 with a straight-through gradient; `logits` are per layer [B, H, T].
    """
    soft = torch.sigmoid(torch.stack(list(logits)))
    hard = (soft > 0.5).float() - soft.detach() + soft
    evicted = hard.mean()
    return torch.clamp(1.0 - 1.0 / ratio - evicted, min=0.0), evicted.detach()
