"""The scale of the gates' inputs, which a run measures once, before its first step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.attachment import Attachment
from octavo.dms import Gates
from octavo.retrofit.lesson import embedded_tokens
from octavo.retrofit.packing import Rows
from octavo.swiftkv import SwiftKV


@torch.no_grad()
def scale_inputs(
    attachment: Attachment,
    transform: SwiftKV | None,
    gates: Gates,
    rows: Rows,
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Set `gates.input_scale` from some rows and divide the weights by it, so that the gates decide what they did.

    Inputs differ a hundredfold in size between layers, and without the scale the gates would learn at different
    speeds. `mean` averages a tensor over all processes.
    """
    scale = mean(_mean_squares(attachment, transform, rows)).rsqrt()[:, None]
    gates.weight.mul_((gates.input_scale / scale)[:, :, None])
    gates.input_scale.copy_(scale)


def _mean_squares(attachment: Attachment, transform: SwiftKV | None, rows: Rows) -> Tensor:
    """The mean square of each gate's input, float32 [KV layers]."""
    squares: list[Tensor] = []

    def measure(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        squares.append(hidden.float().square().mean())

    model = attachment.model
    base: Any = model.base_model
    hooks = [m.register_forward_pre_hook(measure, with_kwargs=True) for m in attachment.layout.own]
    try:
        if transform is None:
            with attachment.using(None):
                base(input_ids=rows.tokens, use_cache=False)
        else:
            spec, stream = transform.spec, embedded_tokens(base, rows.tokens)
            stream = attachment.run_layers(stream, 0, spec.kv_layers, rows.positions, document=rows.document)[-1]
            squares += [transform.normalised(stream).float().square().mean()] * spec.groups
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(squares)
