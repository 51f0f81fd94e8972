"""Adapter files: a folder with `adapter.safetensors` (the gates) and `adapter.json` (everything else).

The JSON names the model's fingerprint, the gate's settings, what was measured (`card`), and a SHA-256 over
both files, so that a truncated or altered adapter is refused. Nothing in it is ever executed.
docs/formats.md specifies both files.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from octavo.config import Eviction
from octavo.dms.gate import Gates, GateSpec
from octavo.errors import AdapterFileError, AdapterMismatchError, ConfigError, OutputFileError

FORMAT = 1
TENSORS = "adapter.safetensors"
SETTINGS = "adapter.json"


@dataclass(frozen=True)
class Adapter:
    """Gates for one model.

    `fingerprint` names the model (see `octavo.attach.fingerprint`); `target` is the compression trained for;
    `card` holds the training settings and the measured results, JSON values only.
    """

    name: str
    gates: Gates
    fingerprint: dict[str, Any]
    target: float
    card: dict[str, Any] = field(default_factory=dict)


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write the adapter into `folder` (made when missing). Written aside and renamed, so never half there.

    Raises OutputFileError.
    """
    folder = Path(folder)
    spec = adapter.gates.spec
    state = adapter.gates.folded_state()
    data = save_tensors({name: state[name].cpu().contiguous() for name in ("weight", "bias")})
    settings: dict[str, Any] = {
        "format": FORMAT,
        "kind": "dms",
        "name": adapter.name,
        "model": adapter.fingerprint,
        "window": spec.eviction.window,
        "shift": spec.eviction.shift,
        "scale": spec.scale,
        "offset": spec.offset,
        "granularity": spec.granularity,
        "target": adapter.target,
        "card": adapter.card,
    }
    settings["sha256"] = _digest(settings, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / TENSORS, data)
        _replace(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as e:
        raise OutputFileError(f"cannot write adapter {folder}: {e.strerror}") from e


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter. Raises AdapterFileError, saying what is wrong, for anything but a whole, valid one."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        data = (folder / TENSORS).read_bytes()
    except OSError as e:
        raise AdapterFileError(f"cannot read adapter {folder}: {e.strerror or e}") from e
    except ValueError as e:
        raise AdapterFileError(f"{folder / SETTINGS} is not valid JSON: {e}") from e
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or settings.get("kind") != "dms":
        raise AdapterFileError(f"{folder / SETTINGS} is not a DMS adapter of format {FORMAT}")
    if settings.get("sha256") != _digest(settings, data):
        raise AdapterFileError(f"adapter {folder} is truncated or was altered: its SHA-256 does not match")
    try:
        gates = _gates(settings, load_tensors(data))
        return Adapter(settings["name"], gates, settings["model"], settings["target"], settings["card"])
    except (KeyError, TypeError, ConfigError, SafetensorError) as e:
        raise AdapterFileError(f"adapter {folder} is incomplete: {e}") from e


def check_fingerprint(adapter: Adapter, model: dict[str, Any]) -> None:
    """Raise AdapterMismatchError unless the adapter was made for the model with this fingerprint.

    Shapes must be equal; norm weights may differ by 5% (they pass through bf16 and quantised files).
    """
    for key, value in adapter.fingerprint.items():
        if key == "norms":
            continue
        if model.get(key) != value:
            raise AdapterMismatchError(
                f"adapter {adapter.name} was made for a model with {key} {value}, this one has {model.get(key)}"
            )
    ours, theirs = model["norms"], adapter.fingerprint.get("norms", [])
    distance = math.dist(ours, theirs) / max(math.hypot(*theirs), 1e-9) if len(ours) == len(theirs) else math.inf
    if not distance < 0.05:
        raise AdapterMismatchError(
            f"adapter {adapter.name} was made for a model of the same shape with other weights "
            f"(norm weights differ by {distance:.0%})"
        )


def _gates(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Gates:
    model = settings["model"]
    spec = GateSpec(
        layers=model["num_hidden_layers"],
        hidden=model["hidden_size"],
        kv_heads=model["num_key_value_heads"],
        eviction=Eviction(settings["window"], settings["shift"]),
        scale=settings["scale"],
        offset=settings["offset"],
        granularity=settings["granularity"],
    )
    gates = Gates(spec)
    for name, parameter in gates.named_parameters():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
            raise ConfigError(f"{name} must be finite with shape {tuple(parameter.shape)}, not {tuple(tensor.shape)}")
        parameter.data = tensor.float()
    return gates


def _digest(settings: dict[str, Any], data: bytes) -> str:
    named = {k: v for k, v in settings.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode() + data).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(data)
    aside.replace(path)
