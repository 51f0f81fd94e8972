"""The fused loss and its gradient are those of the plain formula, whatever the chunk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.retrofit.distillation import distillation_loss, hidden_error


def plain(student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor, temperature: float) -> Tensor:
    log_s = ((student @ head.T) / temperature).log_softmax(-1)
    log_t = ((teacher @ head.T) / temperature).log_softmax(-1)
    return ((log_t.exp() * (log_t - log_s)).sum(-1) * weight).sum() * temperature**2


def case(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(tokens, 5, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    head = torch.randn(11, 5, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.rand(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.7)
    return student.requires_grad_(), teacher, head, weight


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    chunk=st.sampled_from([1, 3, 7, 64, None]),
    temperature=st.sampled_from([1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_value_and_gradient_are_the_plain_ones(tokens, chunk, temperature, dtype):
    student, teacher, head, weight = case(tokens, dtype)
    (expected,) = torch.autograd.grad(plain(student, teacher, head, weight, temperature) * 3, student)
    loss = distillation_loss(student, teacher, head, weight, temperature, chunk)
    (gradient,) = torch.autograd.grad(loss * 3, student)
    exact = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, plain(student, teacher, head, weight, temperature).detach().to(loss), **exact)
    torch.testing.assert_close(gradient, expected, **exact)
    assert torch.equal(gradient[weight == 0], torch.zeros_like(gradient[weight == 0]))


def test_batches_of_sequences_weigh_as_their_tokens():
    student, teacher, head, weight = case(12, torch.float32)
    flat = distillation_loss(student, teacher, head, weight)
    shaped = distillation_loss(student.view(3, 4, 5), teacher.view(3, 4, 5), head, weight.view(3, 4))
    assert flat.item() == shaped.item()
    assert distillation_loss(teacher, teacher, head, weight).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(student, teacher, head, torch.zeros(12)).item() == 0


def test_half_precision_keeps_small_weights():
    """Weights of a large step are far below what bf16 adds up; the gradient keeps its direction and size."""
    student, teacher, head, _ = case(64, torch.bfloat16)
    weight = torch.full((64,), 1e-6)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, head, weight, 2.0), student)
    wide = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(wide, teacher.double(), head.double(), weight, 2.0), wide)
    assert (gradient.double() - expected).norm() < 0.02 * expected.norm()


def test_a_frozen_head_needs_no_gradient_and_backward_works_twice():
    student, teacher, head, weight = case(9, torch.float32)
    loss = distillation_loss(student, teacher, head, weight)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)
    assert head.grad is None


def test_error_of_hidden_states_is_relative_to_each_token():
    teacher = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [1.0, 1.0]]])
    student = teacher + torch.tensor([[[1.0, 0.0], [100.0, 0.0], [9.0, 9.0]]])
    weight = torch.tensor([[0.5, 0.5, 0.0]])
    assert hidden_error(student, teacher, weight).item() == pytest.approx(0.04)
    assert hidden_error(teacher, teacher, weight).item() == 0
