"""The gate: one linear map per layer from the attention module's input to a logit per KV head.

    logit = scale * (weight @ hidden + bias) - offset        evict iff logit > 0

Scale 100 and offset 5 are the paper's: the map starts at zero, so every token starts far on the keeping side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from octavo.config import Eviction
from octavo.errors import ConfigError

Granularity = Literal["head", "layer"]


@dataclass(frozen=True)
class GateSpec:
    """What the gates of one model look like and when a marked token is forgotten.

    `layers`: how many gates, one per KV layer (a set of cached keys and values, which several layers of a model may
    share). `granularity` "head": one decision per KV head; "layer": one for all heads of a layer.
    `borrowed`: the gates read channels of the model's own queries, one per KV head (see `octavo.dms.checkpoint`), which
    are `hidden` wide. Raises ConfigError.
    """

    layers: int
    hidden: int
    kv_heads: int
    eviction: Eviction
    scale: float = 100.0
    offset: float = 5.0
    granularity: Granularity = "head"
    borrowed: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.hidden, self.kv_heads) < 1 or not self.scale > 0:
            raise ConfigError("layers, hidden, kv_heads and scale must be positive")
        if self.granularity not in ("head", "layer"):
            raise ConfigError(f"granularity must be 'head' or 'layer', not {self.granularity!r}")

    @property
    def outputs(self) -> int:
        """Decisions per token and layer."""
        return self.kv_heads if self.granularity == "head" else 1


class Gates(nn.Module):
    """The gates of all layers: `weight` [L, outputs, hidden] and `bias` [L, outputs], float32, zero at first.

    `input_scale` [L, 1] multiplies the input while training, so that all layers learn at one speed; files hold
    the weight with it multiplied in.
    """

    input_scale: Tensor

    def __init__(self, spec: GateSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.layers, spec.outputs, spec.hidden))
        self.bias = nn.Parameter(torch.zeros(spec.layers, spec.outputs))
        self.register_buffer("input_scale", torch.ones(spec.layers, 1))

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """Gate logits [B, kv_heads, N] float32 of one layer from its attention input [B, N, hidden]."""
        spec = self.spec
        raw = nn.functional.linear(hidden.float(), self.weight[layer] * self.input_scale[layer], self.bias[layer])
        logits = (raw * spec.scale - spec.offset).transpose(1, 2)
        return logits.expand(-1, spec.kv_heads, -1)

    def folded_state(self) -> dict[str, Tensor]:
        """The same gates with `input_scale` multiplied into the weight, detached."""
        weight = (self.weight * self.input_scale[:, :, None]).detach()
        return {"weight": weight, "bias": self.bias.detach(), "input_scale": torch.ones_like(self.input_scale)}

    def folded(self, device: torch.device) -> "FoldedGates":
        """The gates as inference uses them: all scales and the offset folded in, detached."""
        weight = self.folded_state()["weight"] * self.spec.scale
        bias = self.bias.detach() * self.spec.scale - self.spec.offset
        return FoldedGates(self.spec, weight.to(device), bias.to(device))


@dataclass(frozen=True)
class FoldedGates:
    """Decisions only: a token is marked iff weight @ hidden + bias > 0."""

    spec: GateSpec
    weight: Tensor  # [L, outputs, hidden] float32
    bias: Tensor  # [L, outputs] float32

    def marked(self, first: int, hidden: Sequence[Tensor]) -> Tensor:
        """Decisions of layers first, first + 1..., [len(hidden), B, kv_heads, N] bool.

        `hidden`: what the keys of each are projected from, [B, N, hidden]; one tensor may stand for several layers.
        """
        weight, bias = self.weight[first : first + len(hidden)], self.bias[first : first + len(hidden)]
        if all(h is hidden[0] for h in hidden):
            inputs = hidden[0].float().flatten(0, 1).expand(len(hidden), -1, -1)  # [l, B*N, hidden]
        else:
            inputs = torch.stack(list(hidden)).float().flatten(1, 2)
        marked = torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2)) > 0  # [l, B*N, outputs]
        marked = marked.view(len(hidden), *hidden[0].shape[:2], -1).transpose(2, 3)
        return marked.expand(-1, -1, self.spec.kv_heads, -1)
