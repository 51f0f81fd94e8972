"""What keys and values depend on beside the tokens: named fields, the same in every process and on every device.

Keys that were cached under other weights are wrong without any sign of it, so weights are known by their content. All
of an 8B model cannot be read each time; a sample of every tensor can. Fine-tuning and merged low-rank adapters change
a large share of a matrix's elements, so a sample sees them. It would not see a few rows that were changed in a large
one.

What a module does beside its weights is known by the whole configuration and by the settings that its modules hold: an
adapter that is switched off, a scale. Functions are not known: a hook that changes what a module answers changes no
identity.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from ctypes import string_at
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from octavo.attachment.layout import NUMBER, decoder_of
from octavo.dms import Gates
from octavo.errors import CacheStateError
from octavo.kv import CacheShape

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

Module = TypeVar("Module", bound=nn.Module)
FORMAT = 2
BLOCKS, BLOCK = 32, 2048  # how many blocks of a tensor a digest reads, and bytes of each; all of a smaller one
PROBES, PROBE = 8, 32  # the same of what is read to see whether a digest still holds,
PROBED = 8192  # but all of a tensor of at most so many bytes
_PLAIN = (bool, int, float, str)
_IGNORED = {  # in a configuration: names, versions, what is asked for, the output layer, how a model was trained
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "num_labels", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_PASSING = {  # in a module: what torch keeps there, and what changes without changing what it computes
    *nn.Module().__dict__, "_is_hf_initialized", "gradient_checkpointing", "max_seq_len_cached", "name_or_path",
    "warnings_issued", NUMBER,
}  # fmt: skip


def identity(attachment: "Attachment", shape: CacheShape, swiftkv: bool) -> dict[str, Any]:
    """What a cache of this shape and mode holds of this model: JSON values by field.

    Taken when it is asked for; whoever changes weights under a filled cache has a cache of no model.
    """
    modes, model = attachment.modes, attachment.model
    gates, eviction = modes.gates(swiftkv), modes.eviction(swiftkv)
    transform = modes.swiftkv.transform if modes.swiftkv is not None and swiftkv else None
    fields = {
        "format": FORMAT,
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
        **({"swiftkv_before": transform.spec.before} if transform and transform.spec.before else {}),
        "swiftkv": attachment.digests.of("swiftkv", transform) if transform else None,
        "gates": attachment.digests.of("gates", gates.gates, folded) if gates else None,
        **{f"config.{name}": value for name, value in _configured(model.config.to_dict()).items()},
        "modules": _digest_of_modules(decoder_of(model)),
        "weights": attachment.digests.of("weights", decoder_of(model)),
    }
    named: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    return named


def folded(gates: Gates) -> str:
    """Hex SHA-256 of gates as forwards run them, whatever form they were published in."""
    spec = asdict(gates.spec)
    if not spec["borrowed"]:
        del spec["borrowed"]  # identities that were taken before gates could be
    return digest(gates.folded_state().items(), spec)


def _configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, without what changes no key."""
    return {
        name: _configured(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value is not None and name not in _IGNORED and not str(name).startswith("_")
    }


def _digest_of_modules(decoder: nn.Module) -> str:
    """Hex SHA-256 over the class and the settings of every module by name."""
    named = [[name, type(module).__qualname__, _settings(module)] for name, module in decoder.named_modules()]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's attributes that are plain values, or lists, tuples and dictionaries of such."""
    found, whole = {}, isinstance(module, PreTrainedModel)  # whose plans for loading and spreading it are no settings
    for name, value in module.__dict__.items():
        if name in _PASSING or (whole and name[0] == "_"):
            continue
        if isinstance(value, _PLAIN):
            found[name] = value
        elif value and not whole and isinstance(value, list | tuple | dict) and (plain := _plain(value)) is not None:
            found[name] = plain
    return found


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; None where it is not made of plain values."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        parts = {str(key): _plain(part) for key, part in value.items()}
        return None if None in parts.values() else parts
    if isinstance(value, list | tuple):
        listed = [_plain(part) for part in value]
        return None if None in listed else listed
    return None


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first field in which two identities differ, None where they are the same."""
    return next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)


class Digests:
    """Digests of modules, made again only where their tensors have changed.

    Writing to a tensor moves its version on, replacing it its address; but what is written through `.data`, as merging
    adapters does, moves neither. So a few bytes of every tensor, spread over it, are read each time.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, str]] = {}

    def of(self, name: str, module: Module, made: Callable[[Module], str] | None = None) -> str:
        """What `made` makes of a module, else the hex SHA-256 of its weights; `name` is where it is kept."""
        tensors = weights(module)
        seen = _state(tensors)
        if name not in self._known or self._known[name][0] != seen:
            self._known[name] = seen, made(module) if made else digest(tensors.items())
        return self._known[name][1]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that a checkpoint of the module has, by name.

    Other buffers are computed from the configuration, and not to the same last bit on every device.
    """
    named = module.state_dict(keep_vars=True).items()
    return {name: part for n, t in named if isinstance(t, Tensor) for name, part in _parts(n, t)}


def _parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of: such a tensor has no elements of its own to read."""
    if not is_traceable_wrapper_subclass(tensor):
        return [(name, tensor)]
    inner, _ = tensor.__tensor_flatten__()
    return [part for each in inner for part in _parts(f"{name}.{each}", getattr(tensor, each))]


def digest(tensors: Iterable[tuple[str, Tensor]], settings: Any = None) -> str:
    """Hex SHA-256 over settings (JSON values), and over names, dtypes, shapes and samples of tensors."""
    named = [(name, t.detach()) for name, t in tensors]
    shapes = [[name, str(t.dtype), list(t.shape)] for name, t in named]
    made = hashlib.sha256(json.dumps([settings, shapes], sort_keys=True).encode())
    made.update(_gathered([_sampled(_bytes(t), BLOCKS, BLOCK, BLOCKS * BLOCK) for _, t in named]))
    return made.hexdigest()


def _state(tensors: Mapping[str, Tensor]) -> object:
    """What changes when any of these tensors is replaced or written to."""
    each = [(name, t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for name, t in tensors.items()]
    here, there, others = list[Tensor](), list[Tensor](), list[Tensor]()
    for t in tensors.values():
        (others if not _in_order(t) else here if _on_host(t) else there if _in_probes(t) else others).append(t)
    return (
        each,
        b"".join(map(_probed, here)),
        _gathered([_probes(t) for t in there]),
        _gathered([_sampled(_bytes(t.detach()), PROBES, PROBE, PROBED) for t in others]),
    )


def _in_order(tensor: Tensor) -> bool:
    """Whether a tensor's bytes lie in order at its address."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()


def _on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _in_probes(tensor: Tensor) -> bool:
    """Whether what is read of a tensor are whole probes, so that it takes a few views and no operation of its own."""
    viewed = tensor.ndim > 0 and tensor.stride(-1) == 1 and not tensor.is_meta  # a column's stride may be any number
    return viewed and (tensor.nbytes > PROBED or tensor.nbytes % PROBE == 0)


def _probes(tensor: Tensor) -> Tensor:
    """What `_sampled` reads of a tensor on another device, [probes, PROBE] uint8: a view, to be copied with others."""
    raw, size = tensor.detach().view(torch.uint8), tensor.nbytes
    count, step = (size // PROBE, PROBE) if size <= PROBED else (PROBES, (size - PROBE) // (PROBES - 1))
    return raw.as_strided((count, PROBE), (step, 1), raw.storage_offset())


def _probed(tensor: Tensor) -> bytes:
    """What `_sampled` reads of a readable tensor, ten times as fast: this is asked before every answer."""
    at, size = tensor.data_ptr(), tensor.nbytes
    if size <= PROBED:
        return string_at(at, size) if size else b""
    step = (size - PROBE) // (PROBES - 1)
    return b"".join([string_at(at + i * step, PROBE) for i in range(PROBES)])


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements in order, [n] uint8; nothing is copied where they lie in order.

    Raises CacheStateError where they are not in memory.
    """
    if tensor.is_meta:
        raise CacheStateError(
            "weights of this model are offloaded, so nothing can say under which of them a cache was filled; snapshots "
            "need a model that is loaded whole"
        )
    return tensor.contiguous().flatten().view(torch.uint8)


def _sampled(raw: Tensor, blocks: int, size: int, whole: int) -> Tensor:
    """Evenly spread blocks of raw bytes [n], or all of them where there are at most `whole`; flat."""
    if len(raw) <= whole:
        return raw
    step = (len(raw) - size) // (blocks - 1)
    return raw.as_strided((blocks, size), (step, 1), raw.storage_offset()).flatten()


def _gathered(samples: list[Tensor]) -> bytes:
    """All samples one after another, from the device in one transfer."""
    return torch.cat(samples).cpu().numpy().tobytes() if samples else b""
