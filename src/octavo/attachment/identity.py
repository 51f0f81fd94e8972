"""What keys and values depend on beside the tokens: named fields, the same in every process and on every device.

Keys that were cached under other weights are wrong without any sign of it, so weights are known by their content. All
of an 8B model cannot be read each time; a sample of every tensor can. Fine-tuning and merged low-rank adapters change
a large share of a matrix's elements, so a sample sees them. It would not see a few rows that were changed in a large
one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.kv import CacheShape

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

FORMAT = 1
BLOCKS, BLOCK = 32, 2048  # how many blocks of a large tensor are read, and bytes of each
WHOLE = BLOCKS * BLOCK  # bytes up to which all of a tensor is read
PROBE = 256  # bytes of each tensor that are read to see whether a digest still holds
_CONFIG = ("model_type", "hidden_act", "rms_norm_eps", "num_attention_heads")  # what else makes keys what they are


def identity(attachment: "Attachment", shape: CacheShape, swiftkv: bool) -> dict[str, Any]:
    """What a cache of this shape and mode holds of this model: JSON values by field.

    Taken when it is asked for; whoever changes weights under a filled cache has a cache of no model.
    """
    modes, config = attachment.modes, attachment.model.config
    gates, eviction = modes.gates(swiftkv), modes.eviction(swiftkv)
    transform = modes.swiftkv.transform if modes.swiftkv is not None and swiftkv else None
    fields = {
        "format": FORMAT,
        **{name: getattr(config, name, None) for name in _CONFIG},
        "rope": {name: getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling")},
        "layers": shape.layers,
        "kv_layers": shape.cached_layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "compute_dtype": str(shape.dtype).removeprefix("torch."),
        "page_dtype": str(shape.layout(attachment.settings).dtype).removeprefix("torch."),
        "window": eviction.window if eviction else None,
        "shift": eviction.shift if eviction else None,
        "swiftkv_first": transform.spec.kv_layers if transform else None,
        "swiftkv_group": transform.spec.group if transform else None,
        "swiftkv": attachment.digests.of("swiftkv", transform) if transform else None,
        "gates": digest(gates.gates.folded_state().items(), asdict(gates.gates.spec)) if gates else None,
        "weights": attachment.digests.of("weights", attachment.model.base_model),
    }
    named: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return named


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first field in which two identities differ, None where they are the same."""
    return next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)


class Digests:
    """Digests of modules, made again only where their tensors have changed.

    Writing to a tensor moves its version on, replacing it its address; but what is written through `.data`, as merging
    adapters does, moves neither. So a few bytes of every tensor are read each time.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, str]] = {}

    def of(self, name: str, module: nn.Module) -> str:
        """Hex SHA-256 of a module's weights; `name` is where it is kept."""
        tensors = weights(module)
        seen = _state(tensors)
        if name not in self._known or self._known[name][0] != seen:
            self._known[name] = seen, digest(tensors.items())
        return self._known[name][1]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that a checkpoint of the module has, by name.

    Other buffers are computed from the configuration, and not to the same last bit on every device.
    """
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def digest(tensors: Iterable[tuple[str, Tensor]], settings: Any = None) -> str:
    """Hex SHA-256 over settings (JSON values), and over names, dtypes, shapes and samples of tensors."""
    named = [(name, t.detach()) for name, t in tensors]
    shapes = [[name, str(t.dtype), list(t.shape)] for name, t in named]
    made = hashlib.sha256(json.dumps([settings, shapes], sort_keys=True).encode())
    made.update(_gathered([_sampled(_bytes(t), BLOCKS, BLOCK) for _, t in named]))
    return made.hexdigest()


def _state(tensors: Mapping[str, Tensor]) -> object:
    """What changes when any of these tensors is replaced or written to."""
    each = [(name, t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for name, t in tensors.items()]
    return each, _gathered([_sampled(_bytes(t.detach()), 1, PROBE) for t in tensors.values()])


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements in order, [n] uint8; nothing is copied where they lie in order."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _sampled(raw: Tensor, blocks: int, size: int) -> Tensor:
    """Evenly spread blocks of raw bytes [n], or all of them where they are few; flat."""
    if len(raw) <= blocks * size:
        return raw
    step = (len(raw) - size) // max(1, blocks - 1)
    return raw.as_strided((blocks, size), (step, 1), raw.storage_offset()).flatten()


def _gathered(samples: list[Tensor]) -> bytes:
    """All samples one after another, from the device in one transfer."""
    return torch.cat(samples).cpu().numpy().tobytes() if samples else b""
