"""What applies with SwiftKV on and what applies with it off: gates, KV layers, weights where the model lies now."""

import copy

import torch
from transformers import PreTrainedModel

from octavo.attachment.layout import Layout
from octavo.config import Eviction
from octavo.dms import Adapter, FoldedGates, HardGates, Policy
from octavo.kv import CacheShape
from octavo.swiftkv import SwiftKV, SwiftKVAdapter


class Modes:
    """The adapters of one model, `skips` True or False being the mode that is asked about, with SwiftKV or without."""

    def __init__(
        self, model: PreTrainedModel, layout: Layout, adapter: Adapter | None, swiftkv: SwiftKVAdapter | None
    ) -> None:
        self.model, self.layout = model, layout
        self.adapter = adapter
        self.swiftkv = swiftkv
        self._cast: SwiftKV | None = None  # what `transform` gave last
        self._folded: FoldedGates | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.layout.runs_on or self.model.device

    def gates(self, skips: bool) -> Adapter | None:
        """The gates that apply in a mode: those distilled on SwiftKV rest without it."""
        adapter = self.adapter
        return adapter if adapter is not None and (adapter.made_on is not None) == skips else None

    def eviction(self, skips: bool) -> Eviction | None:
        """When a cache of this mode forgets."""
        adapter = self.gates(skips)
        return adapter.gates.spec.eviction if adapter else None

    def shape(self, skips: bool) -> CacheShape:
        """What a cache of this mode must look like, where the model lies now."""
        layout, there = self.layout, self.model.config.num_hidden_layers
        layers = sum(layer < there for layer in layout.stores)  # fewer than all while generation exits early
        cached, hands = layers, False
        if self.swiftkv and skips:
            spec = self.swiftkv.transform.spec
            hands = spec.before > 0 and layers > spec.kv_layers
            cached = spec.kv_layer_of(layers - 1) + 1 + hands
        where = self.model.dtype, self.device
        lives = layout.lifetimes[:cached]
        heads = layout.heads[:cached]
        return CacheShape(layers, cached, layout.kv_heads, layout.head_dim, *where, lives, heads, hands)

    def oracle(self, skips: bool) -> tuple[Policy | None, SwiftKV | None]:
        """What a forward without a cache must run under to equal one with a cache of this mode."""
        adapter = self.gates(skips)
        policy = HardGates(adapter.gates.to(self.device)) if adapter else None
        return policy, self.transform() if skips else None

    def folded(self, skips: bool) -> FoldedGates | None:
        """The gates of a mode as caches use them."""
        adapter = self.gates(skips)
        if adapter is None:
            return None
        if self._folded is None or self._folded.weight.device != self.device:
            with torch.inference_mode(False), torch.no_grad():  # it outlives this forward and its mode
                self._folded = adapter.gates.folded(self.device)
        return self._folded

    def transform(self) -> SwiftKV:
        """The SwiftKV weights where the model lies now and in its dtype."""
        assert self.swiftkv is not None
        if self._cast is None or (self._cast.q.device, self._cast.q.dtype) != (self.model.device, self.model.dtype):
            with torch.inference_mode(False), torch.no_grad():
                cast = copy.deepcopy(self.swiftkv.transform).requires_grad_(False)
                self._cast = cast.to(self.model.device, self.model.dtype)
        return self._cast
