"""Writing a model and its adapter as one published checkpoint, which other engines read."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from octavo.adapter_file import check_fingerprint
from octavo.attachment.supported import fingerprint
from octavo.dms.adapter import Adapter
from octavo.dms.checkpoint import MODEL_TYPES, PREFIX, published_fields, published_tensors
from octavo.errors import AdapterMismatchError, ConfigError, UnsupportedModelError
from octavo.swiftkv.adapter import SwiftKVAdapter
from octavo.swiftkv.checkpoint import write_published
from octavo.swiftkv.files import plain_settings, write_checkpoint


def save_published(
    model: PreTrainedModel,
    adapter: Adapter | SwiftKVAdapter,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard: int | str = "5GB",
) -> None:
    """Write a model and its adapter as a published checkpoint that other engines read.

    A SwiftKV adapter of a Llama or Qwen2 model is written in ArcticTraining's layout, gates of a Llama, Mistral, Qwen2
    or Qwen3 model in NVIDIA's, for which their `shift` must be 1. `folder` must be empty or not there; `tokenizer`
    goes beside the weights; `dtype` is that of all tensors and `shard` the largest size of one file. Raises
    UnsupportedModelError, AdapterMismatchError, OutputFileError or ConfigError.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=shard)
    except ValueError as e:
        raise ConfigError(f"shard must be bytes or a size such as '5GB', not {shard!r}") from e
    check_fingerprint(adapter, fingerprint(model))
    place = Path(folder).resolve()  # "." has no name, and what is written aside needs one
    if isinstance(adapter, SwiftKVAdapter):
        write_published(model, adapter.transform, place, tokenizer, dtype=dtype, shard=shard)
    else:
        _write_gates(model, adapter, place, tokenizer, dtype, shard)


def _write_gates(
    model: PreTrainedModel, adapter: Adapter, folder: Path, tokenizer: Any, dtype: torch.dtype, shard: int | str
) -> None:
    base: Any = model.base_model
    if model.config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"no published layout of gates exists for {model.config.model_type} models ({type(model).__name__}), only "
            f"for {', '.join(MODEL_TYPES)}; save the adapter by itself (octavo.save_adapter)"
        )
    if adapter.made_on is not None:
        raise AdapterMismatchError(
            f"the gates {adapter.name} were made on a SwiftKV transform, which NVIDIA's layout does not have"
        )
    gates = adapter.gates
    settings = {k: v for k, v in plain_settings(model, dtype).items() if not k.startswith(PREFIX)}
    settings |= published_fields(gates, adapter.target)
    settings["architectures"] = [type(model).__name__]
    added = published_tensors(gates, [layer.input_layernorm.weight for layer in base.layers])
    write_checkpoint(model, settings, added, folder, tokenizer, dtype=dtype, shard=shard)
