"""Published SwiftKV checkpoints: a whole model with the transform's weights among the base model's, read and written.

Their layout is ArcticTraining's: `Snowflake/Llama-3.1-SwiftKV-8B-Instruct` is one. docs/formats.md tells it. The
configuration's `swiftkv` says which of its two modes a model starts in; it is not read here, since both are there.
"""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from octavo.errors import AdapterFileError, ConfigError, OutputFileError, UnsupportedModelError
from octavo.swiftkv.transform import SwiftKV, SwiftSpec

BASES = {"llama_swiftkv": "llama", "qwen2_swiftkv": "qwen2"}  # published model type: the base model's
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FINAL_NORM = "model.norm.weight"
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

_NOT_WRITTEN = (
    *("dtype", "_name_or_path", "layer_types", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
)


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
    settings = read_config(folder)
    config = base_config(settings, folder)
    spec = _spec(settings, config, folder)
    transform = SwiftKV(spec)
    norm = torch.empty(spec.hidden)
    wanted = {**tensors(transform), FINAL_NORM: norm}
    files = weight_files(folder)
    missing = [name for name in wanted if name not in files]
    if missing:
        raise AdapterFileError(
            f"checkpoint {folder} lacks {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    for file in sorted({files[name] for name in wanted}):
        _read(folder / file, {name: out for name, out in wanted.items() if files[name] == file})
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
    folder = Path(folder)
    settings = _published_settings(model, transform.spec, dtype)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputFileError(f"cannot write checkpoint {folder}: it exists and is not an empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            whole = Path(aside) / folder.name
            whole.mkdir()
            _write_tensors({**base_tensors(model), **tensors(transform)}, whole, dtype, shard)
            (whole / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
            if model.generation_config is not None:
                model.generation_config.save_pretrained(whole)
            if tokenizer is not None:
                tokenizer.save_pretrained(whole)
            if folder.is_dir():
                folder.rmdir()
            whole.rename(folder)
    except (OSError, SafetensorError) as e:
        raise OutputFileError(f"cannot write checkpoint {folder}: {getattr(e, 'strerror', None) or e}") from e


def read_config(folder: str | Path) -> dict[str, Any]:
    """A published checkpoint's config.json. Raises AdapterFileError where it is not one."""
    path = Path(folder) / CONFIG
    try:
        settings = json.loads(path.read_bytes())
    except OSError as e:
        raise AdapterFileError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise AdapterFileError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(settings, dict) or settings.get("model_type") not in BASES:
        raise AdapterFileError(f"{path} is not that of a SwiftKV checkpoint ({', '.join(BASES)})")
    return settings


def base_config(settings: dict[str, Any], source: str | Path) -> PreTrainedConfig:
    """The base model's configuration in a published one (`settings`, of the checkpoint `source`).

    Raises UnsupportedModelError for a quantised checkpoint, AdapterFileError where transformers refuses the fields.
    """
    quantised = settings.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise _quantised(source, f"its config.json has a quantization_config ({method or 'of an unknown method'})")
    fields = {k: v for k, v in settings.items() if k not in _NOT_THE_BASES}
    try:
        return AutoConfig.for_model(BASES[settings["model_type"]], **fields)
    except Exception as e:  # transformers checks fields with errors of its own
        raise AdapterFileError(f"{source}: transformers refuses its config.json: {' '.join(str(e).split())}") from e


def weight_files(folder: Path) -> dict[str, str]:
    """File of every tensor in a checkpoint's folder, by the tensor's name. Raises AdapterFileError."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names(folder / WEIGHTS), WEIGHTS)
    index = folder / INDEX
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except FileNotFoundError as e:
        raise AdapterFileError(f"checkpoint {folder} has neither {WEIGHTS} nor {INDEX}") from e
    except OSError as e:
        raise AdapterFileError(f"cannot read {index}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterFileError(f"{index} is not an index of safetensors files") from e


def files_needed(folder: Path) -> list[str]:
    """Files with tensors that `read_published` reads, for a folder that has config.json and perhaps the index yet."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    settings = read_config(folder)
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
    if getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError(f"{name} is quantised; load the unquantised model to write a SwiftKV checkpoint")
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_WRITTEN}
    rope = dict(fields.pop("rope_parameters"))
    return {
        **fields,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "model_type": kinds[model.config.model_type],
        "architectures": [name.replace("ForCausalLM", "SwiftKVForCausalLM")],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "swiftkv": True,
        "num_key_value_layers": spec.kv_layers,
        "key_value_group_size": spec.group,
    }


def base_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors by name, tied ones once."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _write_tensors(state: dict[str, Tensor], folder: Path, dtype: torch.dtype, shard: int | str) -> None:
    """Write them in `dtype`, with an index where they fill several files; no more than one file is held at a time."""
    shapes = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard)
    for file, names in plan.filename_to_tensors.items():
        part = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _names(path: Path) -> Iterable[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as e:
        raise AdapterFileError(f"cannot read {path}: {e}") from e


def _read(path: Path, wanted: dict[str, Tensor]) -> None:
    """Copy tensors of one file to where they belong."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                if file.get_slice(name).get_dtype().startswith("F8"):
                    raise _quantised(path, f"tensor {name} is of dtype FP8")
            for name, out in wanted.items():
                tensor = file.get_tensor(name)
                if tensor.shape != out.shape or not torch.isfinite(tensor).all():
                    raise AdapterFileError(
                        f"{path}: {name} must be finite with shape {tuple(out.shape)}, not {tuple(tensor.shape)}"
                    )
                out.copy_(tensor)
    except (OSError, SafetensorError) as e:
        raise AdapterFileError(f"cannot read {path}: {e}") from e


def _quantised(source: str | Path, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} is quantised: {found}. FP8 and other quantised SwiftKV checkpoints are not supported; "
        "use the unquantised one (the same name without -FP8)"
    )
