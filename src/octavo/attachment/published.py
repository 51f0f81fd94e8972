"""Published checkpoints, whole models in one folder, as adapters and base models: SwiftKV's layout and that of DMS."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from octavo.attachment.supported import fingerprint_of
from octavo.dms import checkpoint as dms
from octavo.dms.adapter import Adapter
from octavo.errors import AdapterFileError, UnsupportedModelError
from octavo.swiftkv import checkpoint as swiftkv
from octavo.swiftkv.adapter import SwiftKVAdapter
from octavo.swiftkv.files import CONFIG, FINAL_NORM, INDEX, WEIGHTS, config_of, read_config, read_tensors, weight_files

_NOT_THE_BASES = ("model_type", "architectures", "auto_map", "transformers_version")


def published_settings(folder: str | Path) -> dict[str, Any] | None:
    """config.json of a folder with a published checkpoint, None for any other folder."""
    try:
        settings = read_config(folder)
    except AdapterFileError:
        return None
    return settings if settings.get("model_type") in swiftkv.BASES or dms.is_published(settings) else None


def load_published(folder: str | Path, name: str | None = None) -> Adapter | SwiftKVAdapter:
    """The gates or the transform in a published checkpoint's folder; no other tensors are read.

    Raises AdapterFileError, and UnsupportedModelError for quantised checkpoints and models that gates do not fold into.
    """
    folder = Path(folder)
    name, settings = name or folder.resolve().name, read_config(folder)
    if settings.get("model_type") in swiftkv.BASES:
        published = swiftkv.read_published(folder)
        made_for = fingerprint_of(published.config, published.norm)
        return SwiftKVAdapter(name, published.transform, made_for, {"published": published.model_type})
    if not dms.is_published(settings):
        raise AdapterFileError(
            f"{folder / CONFIG} is neither that of a SwiftKV checkpoint ({', '.join(swiftkv.BASES)}) nor of one with "
            f"DMS gates (fields that begin with {dms.PREFIX})"
        )
    return _gates(folder, name, settings)


def base_config(settings: dict[str, Any], source: str | Path) -> PreTrainedConfig:
    """The base model's configuration in a published one (`settings`, of the checkpoint `source`). Raises as above."""
    kind = settings.get("model_type")
    if kind in swiftkv.BASES:
        return swiftkv.base_config(settings, source)
    if kind not in dms.MODEL_TYPES:
        raise UnsupportedModelError(
            f"{source} has DMS gates for a {kind} model; those of {', '.join(dms.MODEL_TYPES)} models can be read"
        )
    fields = {k: v for k, v in settings.items() if k not in _NOT_THE_BASES and not k.startswith(dms.PREFIX)}
    return config_of(kind, fields, source)


def files_needed(folder: Path) -> list[str]:
    """Files with tensors that `load_published` reads, for a folder that has config.json and perhaps the index yet."""
    settings = read_config(folder)
    if settings.get("model_type") in swiftkv.BASES:
        return swiftkv.files_needed(folder)
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    files = weight_files(folder)
    _, wanted = _wanted(folder, settings, files)
    return sorted({files[name] for name in wanted if name in files})


def mark_borrowed(model: PreTrainedModel, settings: dict[str, Any], tensors: Iterable[str], source: str | Path) -> None:
    """Note in a loaded model's configuration that its queries lend a channel to gates, if they do.

    `tensors`: names in the checkpoint's files beside the base model's. Raises AdapterFileError.
    """
    if settings.get("model_type") in swiftkv.BASES:
        return
    if _borrows(dms.read_layout(settings, model.config, source), tensors, source):
        for name, value in settings.items():
            if name.startswith(dms.PREFIX):
                setattr(model.config, name, value)
        setattr(model.config, dms.SEPARATE, False)


def _gates(folder: Path, name: str, settings: dict[str, Any]) -> Adapter:
    files = weight_files(folder)
    layout, wanted = _wanted(folder, settings, files)
    unknown = sorted(each for each in files if f".{dms.PREFIX}" in each and each not in wanted)
    if unknown:
        raise AdapterFileError(f"checkpoint {folder} has unknown tensors of gates: {', '.join(unknown[:3])}")
    read_tensors(folder, files, wanted)
    norm = wanted.pop(FINAL_NORM)
    gates = dms.folded_gates(layout.spec, wanted, folder) if wanted else dms.borrowed_gates(layout.spec)
    made_for = fingerprint_of(base_config(settings, folder), norm)
    return Adapter(name, gates, made_for, layout.target, {"published": "NVIDIA"})


def _wanted(folder: Path, settings: dict[str, Any], names: Iterable[str]) -> tuple[dms.Layout, dict[str, Tensor]]:
    """What a checkpoint's configuration says, and the tensors to fill from its files; `names`: those that it has."""
    config: Any = base_config(settings, folder)
    layout = dms.read_layout(settings, config, folder)
    wanted = {FINAL_NORM: torch.empty(config.hidden_size)}
    if not _borrows(layout, names, folder):
        bias = getattr(config, "attention_bias", False) or any(each.endswith(f"{dms.GATE}.bias") for each in names)
        wanted |= dms.gate_tensors(layout.spec, bool(bias))
    return layout, wanted


def _borrows(layout: dms.Layout, names: Iterable[str], source: str | Path) -> bool:
    """Whether gates read channels of queries: what the configuration says, else whether there are none in the files."""
    found = any(dms.GATE in name for name in names)
    if found and layout.separate is False:
        raise AdapterFileError(
            f"{source}: config.json says {dms.SEPARATE} false, but the files have gates ({dms.GATE})"
        )
    return not found if layout.separate is None else not layout.separate
