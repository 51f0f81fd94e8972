"""SwiftKV: keys and values of the later layers come from one earlier residual stream (arXiv 2410.03960).

With K = `kv_layers`: layers below K are the base model's. h is the residual stream that enters layer K, and
n = norm(h). Every group of `group` layers from K on has one key and one value projection, of n; every one of
these layers has a query projection of its own, of its own input. So a token whose logits nobody asks for is
done when its keys and values are: it runs K layers, not all of them.

With `before` = r, each token also hands r numbers, linear in its n, to the token after it, whose keys and values in
all layers from K on are made from them too. Later layers look for what followed a token, and have that token in their
keys; where half of a model's layers are skipped, n alone holds too little of it (docs/experiments.md, "What half of the
layers lack").

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
    before: int = 0  # r: numbers that each token hands to the one after it

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
        most = min(self.hidden, 2 * self.kv_heads * self.head_dim)  # a cache holds them where keys and values would be
        if type(self.before) is not int or not 0 <= self.before <= most:
            raise ConfigError(f"a token can hand 0 to {most} numbers to the one after it, not {self.before!r}")

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
    [2, groups, kv_heads * head_dim]; with `spec.before` also `hand` [before, hidden], which makes of a token's n what
    it hands on, and `kv_before` [2, groups, kv_heads * head_dim, before]. Kept in float32, or in the model's dtype for
    inference.
    """

    q_bias: nn.Parameter | None
    kv_bias: nn.Parameter | None
    hand: nn.Parameter | None
    kv_before: nn.Parameter | None

    def __init__(self, spec: SwiftSpec) -> None:
        super().__init__()
        self.spec = spec
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.norm = nn.Parameter(torch.ones(spec.hidden))
        self.q = nn.Parameter(torch.zeros(spec.upper, queries, spec.hidden))
        self.kv = nn.Parameter(torch.zeros(2, spec.groups, keys, spec.hidden))
        self.q_bias = nn.Parameter(torch.zeros(spec.upper, queries)) if spec.bias else None
        self.kv_bias = nn.Parameter(torch.zeros(2, spec.groups, keys)) if spec.bias else None
        self.hand = nn.Parameter(torch.zeros(spec.before, spec.hidden)) if spec.before else None
        self.kv_before = nn.Parameter(torch.zeros(2, spec.groups, keys, spec.before)) if spec.before else None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies these weights for gates distilled on them: K, group, `before` and a sample of the key
        projections.

        JSON values, under the names that adapter files have (docs/formats.md).
        """
        flat = self.kv.detach()[0].flatten()
        at = torch.arange(SAMPLE, device=flat.device) * (len(flat) - 1) // (SAMPLE - 1)
        sample = [round(x, 5) for x in flat[at].float().tolist()]
        before = {"before": self.spec.before} if self.spec.before else {}
        return {"kv_layers": self.spec.kv_layers, "group": self.spec.group, **before, "sample": sample}

    def normalised(self, residual: Tensor) -> Tensor:
        """n, [B, N, hidden], from the residual stream that enters layer K; rounds as the base model's RMSNorm does."""
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.eps)
        return self.norm.to(residual.dtype) * x.to(residual.dtype)

    def handed(self, n: Tensor) -> Tensor:
        """What tokens hand to those after them, [..., before], from n [..., hidden]."""
        assert self.hand is not None
        return F.linear(n, self.hand.to(n.dtype))

    def as_slots(self, handed: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens hand on, [B, N, before], in the form of keys and values, each [B, kv_heads, N, head_dim]."""
        spec, (B, N) = self.spec, handed.shape[:2]
        filled = F.pad(handed, (0, 2 * spec.kv_heads * spec.head_dim - spec.before))
        filled = filled.view(B, N, 2, spec.kv_heads, spec.head_dim)
        return filled[:, :, 0].transpose(1, 2), filled[:, :, 1].transpose(1, 2)

    def from_slots(self, key: Tensor, value: Tensor) -> Tensor:
        """What tokens handed on, [B, before], from what `as_slots` made of it, each [B, kv_heads, head_dim]."""
        return torch.cat([key.flatten(1), value.flatten(1)], 1)[:, : self.spec.before]

    def keys_values(
        self, n: Tensor, attention: Sequence[nn.Module], rotary: Rotary, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values of all KV layers from K on, each [groups, B, kv_heads, N, head_dim].

        `n` [B, N, hidden] is what `normalised` gives. `attention`: all attention modules of the base model, whose RoPE
        (and key norm, in Qwen3) applies. `given` [B, N, before]: what the token before each handed on, with
        `spec.before`.
        """
        spec, (B, N) = self.spec, n.shape[:2]
        bias = None if self.kv_bias is None else self.kv_bias.to(n.dtype).flatten()
        both = F.linear(n, self.kv.to(n.dtype).flatten(0, 2), bias)  # one product for all KV layers
        if self.kv_before is not None:
            assert given is not None
            both = both + F.linear(given, self.kv_before.to(n.dtype).flatten(0, 2))
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


def shifted(
    x: Tensor, document: Tensor | None = None, valid: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """Of each token what the one before it had, [B, N, r] like `x`; of the first ones `first` [B, r], None: zeros.

    `document` [B, N] tells packed documents apart, each of which begins anew with zeros. `valid` [B, N] bool: False is
    padding, which is no token; what it gets has no meaning.
    """
    begin = x.new_zeros(len(x), 1, x.shape[-1]) if first is None else first[:, None]
    if valid is not None:
        columns = torch.arange(x.shape[1], device=x.device)
        latest = columns.where(valid, -1).cummax(1).values  # the last token up to each column, -1: none
        latest = F.pad(latest, (1, -1), value=-1)[..., None]
        return x.gather(1, latest.clamp(min=0).expand_as(x)).where(latest >= 0, begin)
    moved = torch.cat([begin, x[:, :-1]], 1)
    if document is None:
        return moved
    begins = document.diff(dim=1, prepend=document[:, :1] - 1) != 0
    return moved.masked_fill(begins[..., None], 0)


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
