"""What a cache must know of a model, and what its pages look like then."""

from dataclasses import dataclass

import torch

from octavo.attention import Lifetime, PageLayout
from octavo.config import CacheSettings

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # what `CacheSettings.kv_dtype` may name


@dataclass(frozen=True)
class CacheShape:
    """What a cache must know of a model. `dtype` is what the model computes in; `layers` may share `cached_layers`.

    `lifetimes`: of each KV layer, None where it attends to everything; empty where all do. `heads`: how many of the
    `kv_heads` each KV layer really has; empty where all have all. `hands`: the last KV layer is one that no layer
    attends to: it holds what each token hands to the one after it (`octavo.swiftkv`).
    """

    layers: int
    cached_layers: int  # KV layers: sets of keys and values, one per layer or per group of layers that share one
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    lifetimes: tuple[Lifetime | None, ...] = ()
    heads: tuple[int, ...] = ()
    hands: bool = False

    @property
    def read_layers(self) -> int:
        """KV layers that attention reads: all but the last where that holds what is handed on."""
        return self.cached_layers - self.hands

    def done_with(self, layer: int) -> range:
        """The KV layers that nobody reads any more once `layer` has been read: with the last one also what is handed
        on, which lies beside it and is stored with it."""
        return range(layer, layer + 1 + (self.hands and layer + 1 == self.read_layers))

    @property
    def windowed(self) -> bool:
        """Whether tokens of any layer, or of heads that a layer does not have, expire by themselves."""
        return bool(self.heads) or any(life is not None for life in self.lifetimes)

    def layout(self, settings: CacheSettings) -> PageLayout:
        """The pages of such a cache."""
        stored = self.dtype if settings.kv_dtype is None else STORED[settings.kv_dtype]
        return PageLayout(settings.page_size, self.head_dim, stored)
