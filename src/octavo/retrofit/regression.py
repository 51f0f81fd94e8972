"""A start of training in closed form, by least squares, which begins at a lower loss than the published averages.

The only input is n, the normalised residual stream that enters layer K. Keys and values of each KV layer from K on
are fitted by ridge regression to what the teacher's own projections give (before RoPE and any key norm; the mean over
a group). Gates of these KV layers are fitted to what gates made for the base model say of each layer's own input.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attachment import Attachment
from octavo.dms import Gates
from octavo.retrofit.lesson import embedded_tokens
from octavo.retrofit.packing import Rows
from octavo.swiftkv import SwiftKV
from octavo.swiftkv.initial import projections

CERTAIN = 3.0  # gate logits are clamped to this: past it the decision is the same, and the fit would spend itself there
Total = Callable[[Tensor], Tensor]
RIDGE = 1e-4  # of each input's mean square
CHUNK = 4096  # tokens in float64 at once


@torch.no_grad()
def fit_keys_values(
    attachment: Attachment,
    transform: SwiftKV,
    parts: Iterable[Rows],
    ridge: float = RIDGE,
    total: Total = lambda tensor: tensor,
) -> None:
    """Set the key and value projections of `transform` from the attached model's own on some rows.

    Sums are float64. `total` adds a tensor up over all processes.
    """
    spec = transform.spec
    fit = _Fit(ridge, constant=spec.bias)
    for rows in parts:
        keep = rows.counted.bool()
        n, streams = _streams(attachment, transform, rows)
        fit.add(n[keep], _projected(attachment, transform, streams)[keep])
    weight, bias = fit.solve(total)
    transform.kv.copy_(weight.reshape(transform.kv.shape))
    if transform.kv_bias is not None and bias is not None:
        transform.kv_bias.copy_(bias.reshape(transform.kv_bias.shape))


@torch.no_grad()
def fit_gates(
    attachment: Attachment,
    transform: SwiftKV,
    gates: Gates,
    taught_by: Gates,
    parts: Iterable[Rows],
    ridge: float = RIDGE,
    total: Total = lambda tensor: tensor,
) -> None:
    """Set the gates of all KV layers from layer K on from gates of the base model, `taught_by`, on some rows.

    Both gates have input_scale 1; `transform` must be fitted or trained.
    """
    spec, layers = transform.spec, attachment.model.base_model.layers
    made: Any = layers
    fit = _Fit(ridge, constant=True)
    for rows in parts:
        keep = rows.counted.bool()
        n, streams = _streams(attachment, transform, rows)
        wanted = [
            torch.stack(
                [
                    taught_by.logits(j, made[j].input_layernorm(streams[j - spec.kv_layers])).clamp(-CERTAIN, CERTAIN)
                    for j in range(spec.first_reader(kv_layer), spec.first_reader(kv_layer) + spec.group)
                ]
            ).mean(0)
            for kv_layer in range(spec.kv_layers, spec.cached_layers)
        ]  # per KV layer [B, kv_heads, T]
        logits = torch.stack(wanted, 1).flatten(1, 2).transpose(1, 2)  # [B, T, groups * kv_heads]
        fit.add(n[keep], ((logits + gates.spec.offset) / gates.spec.scale)[keep])
    weight, bias = fit.solve(total)
    assert bias is not None
    gates.weight[spec.kv_layers :].copy_(weight.reshape(gates.weight[spec.kv_layers :].shape))
    gates.bias[spec.kv_layers :].copy_(bias.reshape(gates.bias[spec.kv_layers :].shape))


class _Fit:
    """Ridge regression from sums over tokens, in float64."""

    def __init__(self, ridge: float, constant: bool) -> None:
        self.ridge, self.constant = ridge, constant
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count more tokens: [n, in] and [n, out]."""
        for narrow, wanted in zip(torch.split(inputs, CHUNK), torch.split(outputs, CHUNK), strict=True):
            x = narrow.double()
            if self.constant:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            xx, xy = x.T @ x, x.T @ wanted.double()
            self.xx = xx if self.xx is None else self.xx + xx
            self.xy = xy if self.xy is None else self.xy + xy

    def solve(self, total: Total) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias [out] where there is a constant)."""
        assert self.xx is not None
        assert self.xy is not None
        xx, xy = total(self.xx), total(self.xy)
        # In proportion to each input's own size: channels of the residual stream differ a hundredfold.
        solved = torch.linalg.solve(xx + torch.diag(xx.diagonal() * self.ridge + 1e-12), xy).T
        return (solved[:, :-1], solved[:, -1]) if self.constant else (solved, None)


def _streams(attachment: Attachment, transform: SwiftKV, rows: Rows) -> tuple[Tensor, list[Tensor]]:
    """n [B, T, hidden], and the residual streams that enter the base model's layers from K on."""
    spec, base = transform.spec, attachment.model.base_model
    embedded = embedded_tokens(base, rows.tokens)
    before = attachment.run_layers(embedded, 0, spec.kv_layers, rows.positions, document=rows.document)[-1]
    streams = [before]
    if spec.upper > 1:
        last = spec.layers - 1
        streams += attachment.run_layers(before, spec.kv_layers, last, rows.positions, document=rows.document)
    return transform.normalised(before), streams


def _projected(attachment: Attachment, transform: SwiftKV, streams: list[Tensor]) -> Tensor:
    """Keys and values wanted of all KV layers from K on, [B, T, 2 * groups * kv_heads * head_dim] float32."""
    spec = transform.spec
    layers: Any = attachment.model.base_model.layers
    wanted: list[Tensor] = []
    upper = layers[spec.kv_layers :]
    made_by = [projections(layer.self_attn)[1:] for layer in upper]
    for which in (0, 1):  # keys, then values
        for group in range(spec.groups):
            members = range(group * spec.group, (group + 1) * spec.group)
            made = [F.linear(upper[i].input_layernorm(streams[i]), *made_by[i][which]) for i in members]
            wanted.append(torch.stack(made).float().mean(0))
    return torch.cat(wanted, -1)
