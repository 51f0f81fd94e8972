"""States that some layers have instead of keys, or beside them: linear attention, Mamba, short convolutions.

They are transformers' own cache layers, one for each such layer. Unlike keys they are overwritten in every step, so a
step that fails needs what they were before it, and a sequence cannot go back.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from octavo.errors import CacheStateError

_TENSORS = ("conv_states", "recurrent_states")  # dicts of a layer from a state's number to its tensor [B, ...]
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")  # the same to bools


def state_layers(config: Any) -> dict[int, Any]:
    """Fresh layers of transformers' cache for a model, by the layer's number, of those that have a state."""
    try:
        from transformers.cache_utils import LinearAttentionLayer
    except ImportError:  # before 5.3
        return {}
    made = {}
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if isinstance(layer, LinearAttentionLayer):
            # Where a layer has keys too, those are in pages, and what is left of it is a layer with a state.
            made[i] = LinearAttentionLayer(number_of_states=layer.number_of_states) if _attends(layer) else layer
    return made


def _attends(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin)


class InPages:
    """What stands in a cache's list of layers for one whose keys are in pages."""

    supports_early_init = False
    is_compileable = False


class States:
    """The states of a batch's sequences in all layers that have one."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.layers = state_layers(config)
        self._before: dict[int, dict[str, Any]] | None = None  # what they were before the running step

    @property
    def nbytes(self) -> int:
        """Bytes that they hold."""
        return sum(t.numel() * t.element_size() for _, t in self._tensors())

    def begin(self) -> None:
        """Remember what they are: steps write into them in place."""
        self._before = {i: _copied(layer) for i, layer in self.layers.items()}

    def commit(self) -> None:
        """A step went well."""
        self._before = None

    def abandon(self) -> None:
        """A step failed: they are as they were."""
        if self._before is not None:
            for i, fields in self._before.items():
                self.layers[i].__dict__.update(fields)
        self._before = None

    def reset(self) -> None:
        """As of no sequence. In place: a cache's list of layers names these objects."""
        for i, fresh in state_layers(self._config).items():
            self.layers[i].__dict__.clear()
            self.layers[i].__dict__.update(fresh.__dict__)
        self._before = None

    def select(self, indices: Sequence[int]) -> None:
        """Keep the sequences at `indices`, in that order."""
        self._replace(lambda t: t[torch.as_tensor(indices, dtype=torch.int64, device=t.device)])

    def take(self, other: Self) -> None:
        """Take over another batch's sequences, behind one's own; the other is empty then."""
        ours, theirs = dict(self._tensors()), dict(other._tensors())
        if ours and theirs:
            self._replace({name: torch.cat([t, theirs[name]]) for name, t in ours.items()}.__getitem__, by_name=True)
        elif theirs:
            for i, layer in other.layers.items():
                self.layers[i].__dict__.update(_copied(layer))
        other.reset()

    def copy(self) -> Self:
        """The same states in tensors of their own."""
        twin = type(self)(self._config)
        for i, layer in self.layers.items():
            twin.layers[i].__dict__.update(_copied(layer))
        return twin

    def tensors(self, sequence: int) -> dict[str, Tensor]:
        """Those of one sequence [1, ...], copied, by names that say layer, kind and number."""
        each = {".".join(map(str, name)): t for name, t in self._tensors()}
        return {name: t[sequence : sequence + 1 or None].clone() for name, t in each.items()}

    def load(self, named: dict[str, Tensor], device: torch.device) -> None:
        """Make them what `tensors` gave, of one sequence."""
        self.reset()
        for name, tensor in named.items():
            layer, kind, number = name.split(".")
            if kind not in _TENSORS or int(layer) not in self.layers:
                raise CacheStateError(f"this model has no state {name}, which the snapshot holds")
            into, which = self.layers[int(layer)], int(number)
            into.lazy_initialization(**{kind: tensor.to(device)}, state_idx=which)
            getattr(into, kind)[which].copy_(tensor)
            into.has_previous_state[which] = True

    def _tensors(self) -> Iterator[tuple[tuple[int, str, int], Tensor]]:
        for i, layer in self.layers.items():
            for kind in _TENSORS:
                for number, tensor in getattr(layer, kind).items():
                    if tensor is not None:
                        yield (i, kind, number), tensor

    def _replace(self, made: Any, by_name: bool = False) -> None:
        for (i, kind, number), tensor in list(self._tensors()):
            getattr(self.layers[i], kind)[number] = made((i, kind, number) if by_name else tensor)


def _copied(layer: Any) -> dict[str, Any]:
    """What a layer holds, in tensors and dicts of its own."""
    fields = dict(layer.__dict__)
    for name in _TENSORS:
        fields[name] = {n: None if t is None else t.clone() for n, t in fields[name].items()}
    for name in (*_FLAGS, "conv_kernel_size"):
        if name in fields:
            fields[name] = dict(fields[name])
    return fields
