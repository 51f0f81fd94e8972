"""What gate training minimises: KL to the same model without eviction, and the eviction still missing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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


def distillation_loss(
    student: Tensor,  # [..., hidden] last hidden states
    teacher: Tensor,  # [..., hidden]
    head: Tensor,  # [vocab, hidden] output embedding
    chunk: int = 4096,
) -> Tensor:
    """Mean KL(teacher || student) per token over the vocabulary.

    Logits are made `chunk` tokens at a time and made again in the backward pass, so that no
    [tokens, vocab] tensor is ever held.
    """
    s, t = student.flatten(0, -2), teacher.flatten(0, -2)
    total = s.new_zeros((), dtype=torch.float32)
    for i in range(0, len(s), chunk):
        part = slice(i, i + chunk)
        total = total + checkpoint(_kl_sum, s[part], t[part], head, use_reentrant=False)
    return total / len(s)


def _kl_sum(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    log_s = (student @ head.T).float().log_softmax(-1)
    log_t = (teacher @ head.T).float().log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum()
