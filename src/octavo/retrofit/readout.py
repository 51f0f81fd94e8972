"""Logits from last hidden states, as the model makes them: most models multiply by their output embedding and nothing
more; some scale, add a bias or cap the product.

Training and evaluation need logits of few tokens at a time, so they cannot ask the whole model for them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.errors import UnsupportedModelError

TRIED = 4  # tokens that a readout is compared on


@dataclass(frozen=True)
class Readout:
    """`cap * tanh(scale * (weight @ hidden + bias) / cap)`; without a cap the scaled product itself."""

    weight: Tensor  # [vocab, hidden], the model's own
    bias: Tensor | None = None  # [vocab]
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] from hidden states after the final norm, [..., hidden], in their dtype."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@torch.no_grad()
def readout(model: PreTrainedModel) -> Readout:
    """How `model` reads its logits, by its configuration, compared with the model's own on a few tokens.

    Raises UnsupportedModelError where they differ.
    """
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(head, "weight", None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embedding to read logits with")
    made = Readout(
        head.weight,  # whole, not a part of it: it stays the model's own when the model is moved
        getattr(head, "bias", None),
        float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0),
        getattr(config, "final_logit_softcapping", None),
    )
    ids = torch.arange(TRIED, device=model.device)[None] % len(head.weight)
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]  # dropout would make two forwards differ
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
        read = made(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    finally:
        model.train(training)
    tolerance = 0.02 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3  # of a product in other shapes
    finite = bool(torch.isfinite(own).all())  # otherwise nothing can be compared, and whoever reads them will say so
    if own.shape != read.shape or (finite and not (own - read).abs().max() <= tolerance * own.abs().max()):
        raise UnsupportedModelError(
            f"{type(model).__name__} makes its logits from its last hidden states in a way that training and "
            "evaluation do not know: more than a product, a bias, a scale and a cap"
        )
    return made
