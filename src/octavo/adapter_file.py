"""Adapter folders: `adapter.safetensors` and `adapter.json`, which both kinds of adapter use.

The JSON holds a SHA-256 over both files, so that a truncated or altered adapter is refused. Nothing in the files is
ever executed. docs/formats.md specifies both.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from octavo.errors import AdapterFileError, AdapterMismatchError, OutputFileError

TENSORS = "adapter.safetensors"
SETTINGS = "adapter.json"
TOLERANCE = 0.05  # relative distance of two samples of one model's weights, which bf16 and quantised files round


def write_adapter(folder: str | Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `settings` (JSON values) and `tensors` into `folder`, which is made when missing. Raises OutputFileError.

    Each file is written aside and renamed, so an interrupted write leaves no half of one.
    """
    folder = Path(folder)
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    # The digest is of sorted keys: a card's lengths sort as the numbers 512, 1024 here, and as strings once read.
    settings = json.loads(json.dumps(settings))
    settings = {**settings, "sha256": _digest(settings, data)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / TENSORS, data)
        _replace(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as e:
        raise OutputFileError(f"cannot write adapter {folder}: {e.strerror}") from e


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The JSON of an adapter folder, unchecked beyond being an object. Raises AdapterFileError."""
    return read_object(Path(folder) / SETTINGS, f"adapter {folder}")


def read_object(path: Path, named: str) -> dict[str, Any]:
    """The JSON object in a file that errors call `named` where it cannot be read. Raises AdapterFileError."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as e:
        raise AdapterFileError(f"cannot read {named}: {e.strerror or e}") from e
    except ValueError as e:
        raise AdapterFileError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path} is not a JSON object")
    return found


def read_adapter(folder: str | Path, kind: str, formats: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors) of an adapter of this kind. Raises AdapterFileError for anything but a whole one."""
    folder = Path(folder)
    settings = read_settings(folder)
    if settings.get("kind") != kind or settings.get("format") not in formats:
        known = " or ".join(map(str, formats))
        raise AdapterFileError(f"{folder / SETTINGS} is not a {kind} adapter of format {known}")
    try:
        data = (folder / TENSORS).read_bytes()
    except OSError as e:
        raise AdapterFileError(f"cannot read adapter {folder}: {e.strerror or e}") from e
    if settings.get("sha256") != _digest(settings, data):
        raise AdapterFileError(f"adapter {folder} is truncated or was altered: its SHA-256 does not match")
    try:
        return settings, load_tensors(data)
    except SafetensorError as e:
        raise AdapterFileError(f"adapter {folder} is incomplete: {e}") from e


class Made(Protocol):
    """An adapter of either kind: what was made for the model with this fingerprint."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...


def check_fingerprint(adapter: Made, model: dict[str, Any]) -> None:
    """Raise AdapterMismatchError unless the adapter was made for the model with this fingerprint.

    `model`: as `attachment.supported.fingerprint` gives it. Shapes must be equal; the sample of norm weights may differ
    by `TOLERANCE`.
    """
    name, made_for = adapter.name, adapter.fingerprint
    for key, value in made_for.items():
        if key != "norms" and model.get(key) != value:
            raise AdapterMismatchError(
                f"adapter {name} was made for a model with {key} {value}, this one has {model.get(key)}"
            )
    distance = relative_distance(model["norms"], made_for.get("norms", []))
    if not distance < TOLERANCE:
        raise AdapterMismatchError(
            f"adapter {name} was made for a model of the same shape with other weights "
            f"(norm weights differ by {distance:.0%})"
        )


def relative_distance(ours: list[float], theirs: list[float]) -> float:
    """Euclidean distance of two samples over the norm of the second; infinite where their sizes differ."""
    return math.dist(ours, theirs) / max(math.hypot(*theirs), 1e-9) if len(ours) == len(theirs) else math.inf


def _digest(settings: dict[str, Any], data: bytes) -> str:
    named = {k: v for k, v in settings.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode() + data).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(data)
    aside.replace(path)
