"""One micro-batch: the teacher's pass, the student's pass, and what the two differ in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.attachment import Attachment
from octavo.dms import SoftGates
from octavo.retrofit.distillation import distillation_loss, hidden_error
from octavo.retrofit.packing import Rows
from octavo.retrofit.readout import Readout
from octavo.swiftkv import SwiftKV


@dataclass(frozen=True)
class Lesson:
    """Scalars, weighted sums over the tokens: T^2 * KL at temperature T, and the error before the last layer."""

    kl: Tensor
    mse: Tensor


def teach(
    attachment: Attachment,
    rows: Rows,
    weight: Tensor,  # [B, T] float32
    temperature: float,
    gates: SoftGates | None,
    transform: SwiftKV | None,
    head: Readout,
) -> Lesson:
    """Run both and compare them; gradients reach the gates and the SwiftKV weights.

    `rows` hold tokens [B, T]; the model is attached. `transform` None trains gates alone; `head` reads its logits.
    """
    if transform is None:
        with attachment.using(None), torch.no_grad():
            teacher = _last_hidden(attachment, rows)
        with attachment.using(gates):
            student = _last_hidden(attachment, rows)
        return Lesson(_kl(student, teacher, head, weight, temperature), weight.new_zeros(()))

    base: Any = attachment.model.base_model
    first, last = transform.spec.kv_layers, transform.spec.layers - 1
    with torch.no_grad():  # in three parts, so that only the streams in between are held
        embedded = embedded_tokens(base, rows.tokens)
        at_first = _through(attachment, embedded, 0, first, rows)
        at_last = _through(attachment, at_first, first, last, rows)
        teacher = base.norm(_through(attachment, at_last, last, last + 1, rows))
    # Without gates the layers below K do in the student what they did in the teacher.
    begin, stream = (first, at_first) if gates is None else (0, embedded)
    streams = attachment.run_layers(
        stream, begin, last + 1, rows.positions, policy=gates, transform=transform, document=rows.document
    )
    kl = _kl(base.norm(streams[-1]), teacher, head, weight, temperature)
    return Lesson(kl, hidden_error([stream, *streams][-2], at_last, weight))


def embedded_tokens(base: Any, tokens: Tensor) -> Tensor:
    """The residual stream that enters a decoder's first layer, [B, T, hidden]; Granite scales its embeddings."""
    out: Tensor = base.embed_tokens(tokens)
    return out * getattr(base, "embedding_multiplier", 1.0)


def _kl(student: Tensor, teacher: Tensor, head: Readout, weight: Tensor, temperature: float) -> Tensor:
    student, teacher = student * head.scale, teacher * head.scale
    bias = None if head.bias is None else head.bias * head.scale
    return distillation_loss(student, teacher, head.weight, weight, temperature, bias=bias, cap=head.cap)


def _last_hidden(attachment: Attachment, rows: Rows) -> Tensor:
    out: Tensor = attachment.model.base_model(input_ids=rows.tokens, use_cache=False).last_hidden_state
    return out


def _through(attachment: Attachment, residual: Tensor, first: int, last: int, rows: Rows) -> Tensor:
    """The residual stream after the teacher's layers first..last-1."""
    if first == last:
        return residual
    return attachment.run_layers(residual, first, last, rows.positions, document=rows.document)[-1]
