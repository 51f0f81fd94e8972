"""SwiftKV adapters: the transform's weights for one model, and their files.

Files hold matrices in int8 with one scale per output row, in bf16 or in float32; int8 changed no measured figure.
docs/formats.md specifies the files.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.adapter_file import TOLERANCE, read_adapter, relative_distance, write_adapter
from octavo.errors import AdapterFileError, AdapterMismatchError, ConfigError
from octavo.swiftkv.transform import SwiftKV, SwiftSpec

KIND = "swiftkv"
FORMAT = 1
Storage = Literal["int8", "bf16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MATRICES = ("q", "kv", "hand", "kv_before")


@dataclass(frozen=True)
class SwiftKVAdapter:
    """A transform for one model.

    `fingerprint` names the model (see `attachment.supported.fingerprint`); `card` holds the training settings and the
    measured results, JSON values only.
    """

    name: str
    transform: SwiftKV
    fingerprint: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)


def save_swiftkv_adapter(adapter: SwiftKVAdapter, folder: str | Path, storage: Storage = "int8") -> None:
    """Write the adapter into `folder` (made when missing). Raises OutputFileError and ConfigError.

    `storage` is that of the projection matrices: int8 with a scale per output row, bf16 or fp32.
    """
    if storage not in ("int8", *_DTYPES):
        raise ConfigError(f"storage must be int8, bf16 or fp32, not {storage!r}")
    tensors: dict[str, Tensor] = {}
    for name, parameter in adapter.transform.named_parameters():
        if name not in _MATRICES:
            tensors[name] = parameter.detach().float()
        elif storage == "int8":
            tensors[name], tensors[f"{name}_scale"] = quantised(parameter.detach())
        else:
            tensors[name] = parameter.detach().to(_DTYPES[storage])
    spec = asdict(adapter.transform.spec)
    if not spec["before"]:
        del spec["before"]  # unknown to versions that read all other adapters
    settings = {
        "format": FORMAT,
        "kind": KIND,
        "name": adapter.name,
        "model": adapter.fingerprint,
        "spec": spec,
        "card": adapter.card,
    }
    write_adapter(folder, settings, tensors)


def load_swiftkv_adapter(folder: str | Path) -> SwiftKVAdapter:
    """Read an adapter; weights become float32. Raises AdapterFileError for anything but a whole, valid one."""
    settings, tensors = read_adapter(folder, KIND, (FORMAT,))
    try:
        transform = SwiftKV(SwiftSpec(**settings["spec"]))
        parameters = dict(transform.named_parameters())
        known = {*parameters, *(f"{name}_scale" for name in parameters if name in _MATRICES)}
        if strange := sorted(tensors.keys() - known):
            raise ConfigError(f"it has tensors that its spec does not: {', '.join(strange)}")
        for name, parameter in parameters.items():
            tensor, scale = tensors[name], tensors.get(f"{name}_scale")
            if tensor.is_floating_point() != (scale is None) or (
                scale is not None and scale.shape != tensor.shape[:-1]
            ):
                raise ConfigError(f"{name} must be floats, or int8 with a scale for each of its rows")
            tensor = tensor.float() if scale is None else tensor.float() * scale[..., None]
            if tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"{name} must be finite with shape {tuple(parameter.shape)}, not {tuple(tensor.shape)}"
                )
            parameter.data = tensor
        return SwiftKVAdapter(settings["name"], transform, settings["model"], settings["card"])
    except (KeyError, TypeError, RuntimeError, ConfigError) as e:
        raise AdapterFileError(f"adapter {folder} is incomplete: {e}") from e


def check_pair(gates: str, made_on: dict[str, Any] | None, adapter: SwiftKVAdapter | None) -> None:
    """Raise AdapterMismatchError unless gates fit what they are attached with.

    `gates` is their adapter's name, `made_on` the fingerprint of the transform they were distilled on (None: the
    base model), `adapter` the transform they are attached with (None: the base model).
    """
    if made_on is None and adapter is None:
        return
    if made_on is None and adapter is not None:
        raise AdapterMismatchError(
            f"gates {gates} were distilled without SwiftKV and cannot judge the layers that {adapter.name} transforms; "
            "`octavo retrofit swiftkv+dms` makes gates for it"
        )
    if made_on is not None and adapter is None:
        raise AdapterMismatchError(
            f"gates {gates} were distilled on a SwiftKV adapter; attach both, as a list or as 'swiftkv+{gates}'"
        )
    assert made_on is not None
    assert adapter is not None
    ours = adapter.transform.fingerprint()
    same = all(made_on.get(key, 0) == ours.get(key, 0) for key in ("kv_layers", "group", "before"))
    if not same or not relative_distance(ours["sample"], made_on.get("sample", [])) < TOLERANCE:
        raise AdapterMismatchError(
            f"gates {gates} were distilled on another SwiftKV adapter ({_shape(made_on)}) than {adapter.name} "
            f"({_shape(ours)})"
        )


def _shape(fingerprint: dict[str, Any]) -> str:
    """What a transform's fingerprint says, for people."""
    said = f"K={fingerprint.get('kv_layers')}, group {fingerprint.get('group')}"
    return f"{said}, before={fingerprint['before']}" if fingerprint.get("before") else said


def as_stored(transform: SwiftKV) -> SwiftKV:
    """A frozen copy on the CPU whose matrices hold the values that an int8 file gives back."""
    copied = copy.deepcopy(transform).cpu().requires_grad_(False)
    for weight in (getattr(copied, name) for name in _MATRICES):
        if weight is not None:
            values, scale = quantised(weight)
            weight.copy_(values * scale[..., None])
    return copied


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [..., out, in], float32 scale [..., out]), rounded to nearest: weight = int8 * scale."""
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale
