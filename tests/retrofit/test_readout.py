"""Logits read from hidden states are the model's own, whatever it does beside the product, and train as they read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig, GraniteConfig, LlamaConfig, PhiConfig

from octavo.errors import UnsupportedModelError
from octavo.retrofit.distillation import distillation_loss
from octavo.retrofit.readout import Readout, readout
from tiny import SHAPE, tiny_model, tokens

CONFIGS = {
    "product": lambda: LlamaConfig(**SHAPE),
    "scaled up": lambda: CohereConfig(**SHAPE, logit_scale=3.0),
    "scaled down": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0),
    "bias": lambda: PhiConfig(**SHAPE),
    "cap": lambda: Gemma3TextConfig(**SHAPE, head_dim=16, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_the_model_s(kind, training):
    model, ids = tiny_model(CONFIGS[kind]), tokens(2, 30)
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.base_model(ids).last_hidden_state
        model.train(training)
        head = readout(model)
        torch.testing.assert_close(head(hidden), expected)
    assert model.training is training
    plain = hidden @ head.weight.detach().T
    assert torch.allclose(plain, expected, atol=1e-4) is (kind == "product"), "a product alone must be another model"


def test_a_readout_that_is_not_known_is_refused():
    class Squared(type(tiny_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits**2
            return out

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    model.__class__ = Squared
    with pytest.raises(UnsupportedModelError, match="Squared makes its logits"):
        readout(model)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_of_these_logits(temperature):
    """Against autograd over logits made at once."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight, bias = (
        torch.randn(*s, generator=generator).double() for s in ((9, 8), (9, 8), (50, 8), (50,))
    )
    student.requires_grad_()
    head, counted = Readout(weight, bias, 0.5, 3.0), torch.rand(9, generator=generator).double()
    log_s, log_t = ((head(x) / temperature).log_softmax(-1) for x in (student, teacher))
    expected = ((log_t.exp() * (log_t - log_s)).sum(-1) * counted).sum() * temperature**2
    loss = distillation_loss(
        student * 0.5, teacher * 0.5, weight, counted, temperature, chunk=4, bias=bias * 0.5, cap=3.0
    )
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
