"""Folders of published checkpoints: config.json and safetensors files, read and written tensor by tensor."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from octavo.adapter_file import read_object
from octavo.errors import AdapterFileError, OutputFileError, UnsupportedModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FINAL_NORM = "model.norm.weight"

_NOT_WRITTEN = (
    *("dtype", "_name_or_path", "layer_types", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json, unchecked beyond being an object. Raises AdapterFileError."""
    path = Path(folder) / CONFIG
    return read_object(path, str(path))


def config_of(model_type: str, fields: dict[str, Any], source: str | Path) -> PreTrainedConfig:
    """The configuration of a base model of this type from a published checkpoint's `fields`.

    Raises UnsupportedModelError for a quantised checkpoint, AdapterFileError where transformers refuses the fields.
    """
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise _quantised(source, f"its config.json has a quantization_config ({method or 'of an unknown method'})")
    try:
        return AutoConfig.for_model(model_type, **fields)
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


def read_tensors(folder: Path, files: dict[str, str], wanted: dict[str, Tensor]) -> None:
    """Copy tensors of a checkpoint, by name, to where they belong; `files` as `weight_files` gives it.

    Raises AdapterFileError for missing ones, wrong shapes and values that are not finite, UnsupportedModelError for a
    quantised checkpoint.
    """
    missing = [name for name in wanted if name not in files]
    if missing:
        raise AdapterFileError(
            f"checkpoint {folder} lacks {len(missing)} of {len(wanted)} tensors: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    for file in sorted({files[name] for name in wanted}):
        _read(folder / file, {name: out for name, out in wanted.items() if files[name] == file})


def plain_settings(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """A model's configuration with the keys that readers of published checkpoints know: those of transformers 4.

    Raises UnsupportedModelError for a quantised model.
    """
    if getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised; load the unquantised model to write a checkpoint"
        )
    fields = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_WRITTEN}
    rope = dict(fields.pop("rope_parameters"))
    return {
        **fields,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_checkpoint(
    model: PreTrainedModel,
    settings: dict[str, Any],
    added: dict[str, Tensor],
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype,
    shard: int | str,
) -> None:
    """Write a model's tensors, those `added` and `settings` (config.json), aside and renamed, so never half there.

    `dtype` is that of all tensors, `shard` the largest size of one file. Raises OutputFileError where `folder` is not
    empty or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputFileError(f"cannot write checkpoint {folder}: it exists and is not an empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            whole = Path(aside) / folder.name
            whole.mkdir()
            _write_tensors({**base_tensors(model), **added}, whole, dtype, shard)
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
        f"{source} is quantised: {found}. FP8 and other quantised published checkpoints are not supported; "
        "use the unquantised one (the same name without -FP8)"
    )
