"""SwiftKV: keys and values of the later layers come from one earlier residual stream (arXiv 2410.03960).

With K = `kv_layers`: layers below K are the base model's. h is the residual stream that enters layer K, and
n = norm(h). Every group of `group` layers from K on has one key and one value projection, of n; every one of
these layers has a query projection of its own, of its own input. So a token whose logits nobody asks for is
done when its keys and values are: it runs K layers, not all of them.

A KV layer is one set of cached keys and values. Each layer below K has its own, and each group from K on shares
one. KV layers are numbered from 0 in the order of the layers that read them, so a cache has `cached_layers` of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import ConfigError

Rotary = tuple[Tensor, Tensor]  # (cos, sin) [B or 1, N, D], as the decoder hands them to its layers
SAMPLE = 64  # weights that a fingerprint holds


@dataclass(frozen=True)
class SwiftSpec:
    """The shape of one transform.

    `kv_layers` is K under its published name (`num_key_value_layers`); how many KV layers a cache has is
    `cached_layers`. Raises ConfigError unless 1 <= K < layers and the groups divide the layers from K on.
    """

    layers: int  # of the whole model
    kv_layers: int  # K: layers below it compute keys and values of their own, as the base model does
    group: int  # layers from K on that share one KV layer (AcrossKV); 1: none do
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False  # whether the projections have one (Qwen2)
    eps: float = 1e-6  # of the norm

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", float(f"{self.eps:.6g}"))  # GGUF files hold it in float32
        if not 1 <= self.kv_layers < self.layers:
            raise ConfigError(
                f"SwiftKV's first transformed layer must lie in 1..{self.layers - 1} for a model of {self.layers} "
                f"layers, not {self.kv_layers}"
            )
        if self.group < 1 or self.upper % self.group:
            raise ConfigError(
                f"groups of {self.group} do not divide the {self.upper} layers from {self.kv_layers} on; "
                "choose another group or first layer"
            )

    @property
    def upper(self) -> int:
        """Transformed layers: those from K on."""
        return self.layers - self.kv_layers

    @property
    def groups(self) -> int:
        """Groups of transformed layers, and so the KV layers from K on."""
        return self.upper // self.group

    @property
    def cached_layers(self) -> int:
        """KV layers of the whole model: one per layer below K, one per group from K on."""
        return self.kv_layers + self.groups

    def kv_layer_of(self, layer: int) -> int:
        """The KV layer that a layer reads."""
        return layer if layer < self.kv_layers else self.kv_layers + (layer - self.kv_layers) // self.group

    def first_reader(self, kv_layer: int) -> int:
        """The first layer that reads a KV layer."""
        return kv_layer if kv_layer < self.kv_layers else self.kv_layers + (kv_layer - self.kv_layers) * self.group


class SwiftKV(nn.Module):
    """The weights of one transform, for layers K + i and KV layers K + g.

    `norm` [hidden]; `q` [upper, heads * head_dim, hidden]; `kv` [2, groups, kv_heads * head_dim, hidden]
    (keys, then values); with `spec.bias` also `q_bias` [upper, heads * head_dim] and `kv_bias`
    [2, groups, kv_heads * head_dim]. Kept in float32, or in the model's dtype for inference.
    """

    q_bias: nn.Parameter | None
    kv_bias: nn.Parameter | None

    def __init__(self, spec: SwiftSpec) -> None:
        super().__init__()
        self.spec = spec
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.norm = nn.Parameter(torch.ones(spec.hidden))
        self.q = nn.Parameter(torch.zeros(spec.upper, queries, spec.hidden))
        self.kv = nn.Parameter(torch.zeros(2, spec.groups, keys, spec.hidden))
        self.q_bias = nn.Parameter(torch.zeros(spec.upper, queries)) if spec.bias else None
        self.kv_bias = nn.Parameter(torch.zeros(2, spec.groups, keys)) if spec.bias else None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these weights for gates distilled on them: K, group and a sample of the key projections.

        JSON values, under the names that adapter files have (docs/formats.md).
        """
        flat = self.kv.detach()[0].flatten()
        at = torch.arange(SAMPLE, device=flat.device) * (len(flat) - 1) // (SAMPLE - 1)
        sample = [round(x, 5) for x in flat[at].float().tolist()]
        return {"kv_layers": self.spec.kv_layers, "group": self.spec.group, "sample": sample}

    def normalised(self, residual: Tensor) -> Tensor:
        """n, [B, N, hidden], from the residual stream that enters layer K; rounds as the base model's RMSNorm does."""
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.eps)
        return self.norm.to(residual.dtype) * x.to(residual.dtype)

    def keys_values(self, n: Tensor, attention: Sequence[nn.Module], rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values of all KV layers from K on, each [groups, B, kv_heads, N, head_dim].

        `n` [B, N, hidden] is what `normalised` gives. `attention`: all attention modules of the base model, whose RoPE
        (and key norm, in Qwen3) applies.
        """
        spec, (B, N) = self.spec, n.shape[:2]
        bias = None if self.kv_bias is None else self.kv_bias.to(n.dtype).flatten()
        both = F.linear(n, self.kv.to(n.dtype).flatten(0, 2), bias)  # one product for all KV layers
        both = both.view(B, N, 2, spec.groups, spec.kv_heads, spec.head_dim)
        key, value = both[:, :, 0], both[:, :, 1].permute(2, 0, 3, 1, 4)
        readers: list[Any] = [attention[spec.first_reader(spec.kv_layers + g)] for g in range(spec.groups)]
        if hasattr(readers[0], "k_norm"):
            key = torch.stack([module.k_norm(key[:, :, g]) for g, module in enumerate(readers)], 2)
        if all(map(has_rotary, readers)):
            key = rotated(readers[0], key.flatten(2, 3).transpose(1, 2), rotary)  # [B, groups * kv_heads, N, D]
            return key.view(B, spec.groups, spec.kv_heads, N, spec.head_dim).transpose(0, 1), value
        each = zip(readers, key.unbind(2), strict=True)
        return torch.stack([rotated(module, k.transpose(1, 2), rotary) for module, k in each]), value

    def query(self, layer: int, hidden: Tensor, module: nn.Module, rotary: Rotary) -> Tensor:
        """Queries after RoPE of one layer from K on, [B, heads, N, head_dim], from its input [B, N, hidden]."""
        spec, i = self.spec, layer - self.spec.kv_layers
        bias = None if self.q_bias is None else self.q_bias[i].to(hidden.dtype)
        query = F.linear(hidden, self.q[i].to(hidden.dtype), bias)
        query = query.view(*hidden.shape[:2], spec.heads, spec.head_dim)
        norm: Any = getattr(module, "q_norm", None)
        if norm is not None:
            query = norm(query)
        return rotated(module, query.transpose(1, 2), rotary)


def has_rotary(module: nn.Module) -> bool:
    """Whether a layer's attention turns queries and keys by their positions; in SmolLM3 every fourth one does not."""
    return bool(getattr(module, "use_rope", True))


def rotated(module: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
    """RoPE [B, heads, N, D] by the function that the attention module's own model defines, where the layer has it."""
    if not has_rotary(module):
        return x
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    out: Tensor = apply(x, x[:, :0], *rotary)[0]
    return out
