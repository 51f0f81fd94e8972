"""A start of training in closed form, by least squares, which begins at a lower loss than the published averages.

The only input is n, the normalised residual stream that enters layer K. Keys and values of each KV layer from K on
are fitted by ridge regression to what the teacher's own projections give (before RoPE and any key norm; the mean over
a group). Where tokens hand numbers on, the fit is to n and to the n of the token before, of which as many directions
are kept as there are numbers: those that explain most of what n alone does not. Gates of these KV layers are fitted to
what gates made for the base model say of each layer's own input.
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
from octavo.swiftkv.transform import shifted

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
        inputs = torch.cat([shifted(n, rows.document), n], -1) if spec.before else n
        fit.add(inputs[keep], _projected(attachment, transform, streams)[keep])
    if transform.hand is None or transform.kv_before is None:
        weight, bias = fit.solve(total)
    else:
        blocks = 2 * spec.groups * spec.kv_heads  # keys of one layer and head are as large as each other, not as others
        hand, made, weight, bias = fit.solve_handed(total, spec.hidden, spec.before, blocks)
        transform.hand.copy_(hand)
        transform.kv_before.copy_(made.reshape(transform.kv_before.shape))
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
        self.yy: Tensor | None = None  # [out], of squares

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count more tokens: [n, in] and [n, out]."""
        for narrow, wanted in zip(torch.split(inputs, CHUNK), torch.split(outputs, CHUNK), strict=True):
            x = narrow.double()
            if self.constant:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            xx, xy = x.T @ x, x.T @ wanted.double()
            self.xx = xx if self.xx is None else self.xx + xx
            self.xy = xy if self.xy is None else self.xy + xy
            yy = wanted.double().square().sum(0)
            self.yy = yy if self.yy is None else self.yy + yy

    def solve(self, total: Total) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias [out] where there is a constant)."""
        assert self.xx is not None
        assert self.xy is not None
        xx, xy = self._ridged(total(self.xx)), total(self.xy)
        return self._parted(torch.linalg.solve(xx, xy).T)

    def solve_handed(
        self, total: Total, first: int, rank: int, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The same where the weights of the `first` inputs are a product of rank `rank`.

        (hand [rank, first], made [out, rank], weight [out, in - first], bias), with weights made @ hand of the first
        inputs: reduced-rank regression of what the other inputs leave, in which each of `blocks` equal parts of the
        outputs weighs the same.
        """
        assert self.xx is not None
        assert self.xy is not None
        assert self.yy is not None
        xx, xy, yy = self._ridged(total(self.xx)), total(self.xy), total(self.yy)
        by_others = torch.linalg.solve(xx[first:, first:], torch.cat([xx[first:, :first], xy[first:]], 1))
        left = torch.cat([xx[:first, :first], xy[:first]], 1) - xx[:first, first:] @ by_others
        whole = torch.linalg.solve(left[:, :first], left[:, first:])  # [first, out]
        size = yy.view(blocks, -1).mean(1).sqrt().clamp(min=1e-12).repeat_interleave(len(yy) // blocks)
        root = torch.linalg.cholesky((left[:, :first] + left[:, :first].T) / 2)  # inputs @ root have products of one
        directions = torch.linalg.svd((root.T @ whole / size).T, full_matrices=False)[0][:, :rank]  # [out, rank]
        hand = directions.T @ (whole / size).T  # [rank, first]
        made = directions * size[:, None]  # [out, rank]
        balance = (made.square().mean(0) / hand.square().mean(1).clamp(min=1e-30)).sqrt().sqrt()
        hand, made = hand * balance[:, None], made / balance  # as large as each other, or Adam moves one far too much
        weight, bias = self._parted(
            torch.linalg.solve(xx[first:, first:], xy[first:] - xx[first:, :first] @ (made @ hand).T).T
        )
        return hand, made, weight, bias

    def _ridged(self, xx: Tensor) -> Tensor:
        """With the ridge in proportion to each input's own size: channels of the stream differ a hundredfold."""
        return xx + torch.diag(xx.diagonal() * self.ridge + 1e-12)

    def _parted(self, solved: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of [out, in] weights of which the last is the constant's, where there is one."""
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
