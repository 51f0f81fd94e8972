"""Published SwiftKV checkpoints: a whole model with the transform's weights among the base model's, read and written.

Their layout is ArcticTraining's: `Snowflake/Llama-3.1-SwiftKV-8B-Instruct` is one. docs/formats.md tells it. The
configuration's `swiftkv` says which of its two modes a model starts in; it is not read here, since both are there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from octavo.errors import AdapterFileError, ConfigError, UnsupportedModelError
from octavo.swiftkv.files import (
    CONFIG,
    FINAL_NORM,
    INDEX,
    WEIGHTS,
    config_of,
    plain_settings,
    read_config,
    read_tensors,
    weight_files,
    write_checkpoint,
)
from octavo.swiftkv.transform import SwiftKV, SwiftSpec

BASES = {"llama_swiftkv": "llama", "qwen2_swiftkv": "qwen2"}  # published model type: the base model's
_OURS = ("swiftkv", "num_key_value_layers", "key_value_group_size")
_SIZES = {  # of the transform: where the configuration has them
    "layers": "num_hidden_layers",
    "kv_layers": "num_key_value_layers",
    "group": "key_value_group_size",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
_NOT_THE_BASES = ("model_type", "architectures", "auto_map", "transformers_version", *_OURS)


@dataclass(frozen=True)
class Published:
    """What a checkpoint holds beside the base model's layers."""

    model_type: str  # as published
    config: PreTrainedConfig  # of the base model
    transform: SwiftKV  # float32
    norm: Tensor  # [hidden], the base model's final norm, which identifies it


def is_published(folder: str | Path) -> bool:
    """Whether this folder's config.json is that of a published SwiftKV checkpoint."""
    try:
        settings = json.loads((Path(folder) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("model_type") in BASES


def read_published(folder: str | Path) -> Published:
    """Read the transform's tensors, and no others, into float32.

    Raises AdapterFileError for a checkpoint that lacks some or has impossible ones, UnsupportedModelError for a
    quantised one.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    config = base_config(settings, folder)
    spec = _spec(settings, config, folder)
    transform = SwiftKV(spec)
    norm = torch.empty(spec.hidden)
    wanted = {**tensors(transform), FINAL_NORM: norm}
    read_tensors(folder, weight_files(folder), wanted)
    return Published(settings["model_type"], config, transform, norm)


def tensors(transform: SwiftKV) -> dict[str, Tensor]:
    """The transform's tensors by their published names: views of its parameters, to read and to write."""
    spec = transform.spec
    named = {"model.norm_swiftkv.weight": transform.norm.detach()}
    for i in range(spec.upper):
        query = f"model.layers.{spec.kv_layers + i}.self_attn.q_proj_swiftkv"
        named[f"{query}.weight"] = transform.q.detach()[i]
        if transform.q_bias is not None:
            named[f"{query}.bias"] = transform.q_bias.detach()[i]
    for g in range(spec.groups):
        for which, letter in enumerate("kv"):
            projection = f"model.layers.{spec.first_reader(spec.kv_layers + g)}.self_attn.{letter}_proj_swiftkv"
            named[f"{projection}.weight"] = transform.kv.detach()[which, g]
            if transform.kv_bias is not None:
                named[f"{projection}.bias"] = transform.kv_bias.detach()[which, g]
    return named


def write_published(
    model: PreTrainedModel,
    transform: SwiftKV,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard: int | str = "5GB",
) -> None:
    """Write base model and transform as one checkpoint, aside and renamed, so never half there.

    `dtype` is that of all tensors, `shard` the largest size of one file. Raises UnsupportedModelError where no
    published layout exists for the model, OutputFileError where `folder` is not empty or cannot be written.
    """
    if transform.spec.before:
        raise UnsupportedModelError(
            "this SwiftKV adapter's tokens hand numbers to the one after them, which no published layout has; "
            "share it as an adapter (octavo.save_swiftkv_adapter), or train one with --before 0"
        )
    settings = _published_settings(model, transform.spec, dtype)
    write_checkpoint(model, settings, tensors(transform), folder, tokenizer, dtype=dtype, shard=shard)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """A published checkpoint's config.json. Raises AdapterFileError where it is not one."""
    settings = read_config(folder)
    if settings.get("model_type") not in BASES:
        raise AdapterFileError(f"{Path(folder) / CONFIG} is not that of a SwiftKV checkpoint ({', '.join(BASES)})")
    return settings


def base_config(settings: dict[str, Any], source: str | Path) -> PreTrainedConfig:
    """The base model's configuration in a published one (`settings`, of the checkpoint `source`).

    Raises UnsupportedModelError for a quantised checkpoint, AdapterFileError where transformers refuses the fields.
    """
    fields = {k: v for k, v in settings.items() if k not in _NOT_THE_BASES}
    return config_of(BASES[settings["model_type"]], fields, source)


def files_needed(folder: Path) -> list[str]:
    """Files with tensors that `read_published` reads, for a folder that has config.json and perhaps the index yet."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    settings = read_settings(folder)
    with torch.device("meta"):
        wanted = [*tensors(SwiftKV(_spec(settings, base_config(settings, folder), folder))), FINAL_NORM]
    files = weight_files(folder)
    return sorted({files[name] for name in wanted if name in files})


def _spec(settings: dict[str, Any], config: Any, source: Path) -> SwiftSpec:
    sizes: dict[str, Any] = {field: getattr(config, name, settings.get(name)) for field, name in _SIZES.items()}
    sizes["group"] = sizes["group"] or 1
    for field, value in sizes.items():
        if type(value) is not int:
            raise AdapterFileError(
                f"{source / CONFIG}: {_SIZES[field]} must be a whole number, not {json.dumps(value)}"
            )
    try:
        return SwiftSpec(
            **sizes,
            head_dim=getattr(config, "head_dim", None) or sizes["hidden"] // sizes["heads"],
            bias=config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False)),
            eps=config.rms_norm_eps,
        )
    except ConfigError as e:
        raise AdapterFileError(f"{source / CONFIG}: {e}") from e


def _published_settings(model: PreTrainedModel, spec: SwiftSpec, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the keys that readers of published checkpoints know: those of transformers 4."""
    name, kinds = type(model).__name__, {base: published for published, base in BASES.items()}
    if model.config.model_type not in kinds:
        raise UnsupportedModelError(
            f"no published SwiftKV layout exists for {model.config.model_type} models ({name}), only for "
            f"{' and '.join(kinds)}; save the adapter by itself (octavo.save_swiftkv_adapter)"
        )
    return {
        **plain_settings(model, dtype),
        "model_type": kinds[model.config.model_type],
        "architectures": [name.replace("ForCausalLM", "SwiftKVForCausalLM")],
        "swiftkv": True,
        "num_key_value_layers": spec.kv_layers,
        "key_value_group_size": spec.group,
    }
