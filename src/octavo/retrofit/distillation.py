"""The losses between student and teacher: of the distribution over the next token, and of hidden states.

The KL and its gradient with respect to the student's hidden states are made in one go, a chunk of tokens at a
time: nothing of size [tokens, vocab] outlives its chunk, and the backward pass computes no logits again.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 2**27  # logits in one chunk
Chunk = Callable[[Tensor, Tensor, float, float | None], tuple[Tensor, Tensor]]


def distillation_loss(
    student: Tensor,  # [..., hidden] last hidden states, after the final norm
    teacher: Tensor,  # [..., hidden]
    head: Tensor,  # [vocab, hidden] output embedding, frozen
    weight: Tensor,  # [...] of each token, 0 for those that do not count
    temperature: float = 1.0,
    chunk: int | None = None,
    bias: Tensor | None = None,  # [vocab] of the logits, frozen
    cap: float | None = None,  # logits are cap * tanh(product / cap)
) -> Tensor:
    """Sum over tokens of weight * T^2 * KL(teacher || student) at temperature T, a float32 scalar.

    Logits are made in the model's dtype, softmax and sums in float32 (float64 for float64). `chunk`: tokens at a
    time. Gradients reach `student` only.
    """
    rows = chunk or max(256, ELEMENTS // len(head) // 256 * 256)
    loss: Tensor = _Distillation.apply(  # type: ignore[no-untyped-call]
        student.flatten(0, -2), teacher.flatten(0, -2), head, bias, weight.flatten(), temperature, cap, rows
    )
    return loss


def hidden_error(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of weight * squared error / squared norm of the teacher's, a scalar; all [..., hidden], [...].

    The published loss is the plain mean square, whose scale differs a thousandfold between models and between
    the tokens of one: the first tokens' streams are huge. Taken relative to each token's own it is
    the model's scale, and no token drowns the others.
    """
    t = teacher.float()
    error = (student.float() - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12)
    return (error * weight).sum()


class _Distillation(torch.autograd.Function):
    """Inputs flattened: student, teacher [N, hidden], weight [N]."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, bias: Tensor | None, weight: Tensor,
        temperature: float, cap: float | None, rows: int,
    ) -> Tensor:  # fmt: skip
        made = _compiled() if student.is_cuda else _chunk
        gradient = torch.empty_like(student)
        total = weight.new_zeros((), dtype=_wide(student.dtype))
        for first in range(0, len(student), rows):
            part = slice(first, first + rows)
            s, t, w = student[part], teacher[part], weight[part, None]
            n = len(s)
            if student.is_cuda and n < rows:  # one shape, one compilation
                s, t = F.pad(s, (0, 0, 0, rows - n)), F.pad(t, (0, 0, 0, rows - n))
            kl, difference = made(F.linear(s, head, bias), F.linear(t, head, bias), temperature, cap)
            total += (kl[:n] * weight[part]).sum() * temperature**2
            # The weight comes after the product: in half precision its small values would be lost.
            gradient[part] = ((difference @ head)[:n] * (temperature * w)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), *[None] * 7


def _chunk(student: Tensor, teacher: Tensor, temperature: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """From products [n, vocab]: KL(teacher || student) of each row [n], and what its gradient has of the student's.

    That is p_student - p_teacher in their dtype, times the slope of the cap.
    """
    wide = _wide(student.dtype)
    slope = None
    if cap is not None:
        student, teacher = cap * torch.tanh(student / cap), cap * torch.tanh(teacher / cap)
        slope = 1 - (student.to(wide) / cap).square()
    log_s = (student.to(wide) / temperature).log_softmax(-1)
    log_t = (teacher.to(wide) / temperature).log_softmax(-1)
    p_t = log_t.exp()
    difference = log_s.exp() - p_t
    if slope is not None:
        difference = difference * slope
    return (p_t * (log_t - log_s)).sum(-1), difference.to(student.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _compiled() -> Chunk:
    compiled: Chunk = torch.compile(_chunk, dynamic=False)
    return compiled
