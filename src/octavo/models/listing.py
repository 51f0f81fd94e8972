"""What is known of transformers' decoder classes, and what `attach` would do with a model, without its weights."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from octavo.attachment.published import base_config
from octavo.attachment.states import state_layers
from octavo.attachment.supported import layout_of
from octavo.errors import ModelNotFoundError, OctavoError, UnsupportedModelError
from octavo.models.gguf import unpacked_gguf
from octavo.models.load import default_model, is_missing, published_config


class Walked(NamedTuple):
    """One decoder class, and what a walk over all of them found (docs/models.md)."""

    type: str
    name: str
    outcome: str  # "exact", "refused" by `attach`, or "no model": none was made that is small enough
    why: str


class Foreseen(NamedTuple):
    """What `attach` would do with a model. `refused` is its reason, None: it would attach it."""

    name: str  # of its class
    refused: str | None
    facts: tuple[tuple[str, str], ...] = ()  # what its layout is, for people
    walked: Walked | None = None  # what is known of its class, where its own layout could not be seen


def walked() -> Sequence[Walked]:
    """All decoder classes of the version of transformers that was walked last."""
    record = json.loads((files("octavo") / "models" / "decoders.json").read_text())
    return [Walked(each["type"], each["class"], each["outcome"], each["why"]) for each in record["classes"]]


def foresee(source: str | Path) -> Foreseen:
    """What `attach` would do with a model, from its configuration alone: a folder, a config.json, a hub id, or
    "default", the embedded model.

    The model is made without memory for its weights, and tried as `attach` tries it. Where its layers need numbers for
    that, what the walk found of its class is all that can be said. Raises ModelNotFoundError.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what it says of weights and kernels
    try:
        return _foreseen(_config(str(source)))
    finally:
        transformers_logging.set_verbosity(level)


def _foreseen(config: PreTrainedConfig) -> Foreseen:
    name = str(config.model_type)
    known = next((each for each in walked() if each.type == config.model_type), None)
    try:
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM
            model = made.from_config(config, dtype=torch.bfloat16).eval()
        name = type(model).__name__
        layout = layout_of(model)
    except UnsupportedModelError as e:
        return Foreseen(name, str(e), walked=known if "fails in a trial" in str(e) else None)
    except Exception as e:  # transformers meets impossible settings with whatever error they lead to
        raise ModelNotFoundError(f"cannot make a model of type {name}: {type(e).__name__}: {e}") from e
    windows = [f"{'chunk' if life.chunked else 'window'} of {life.length:,}" for life in layout.lifetimes if life]
    states = state_layers(model.config.get_text_config(decoder=True))
    facts = [
        ("layers that keep keys", f"{len(layout.stores)}, of {layout.kv_heads} KV heads of {layout.head_dim}"),
        (
            "of these with a window",
            ", ".join(f"{windows.count(w)} with a {w}" for w in dict.fromkeys(windows)) or "none",
        ),
        ("layers with a state of their own", str(len(states))),
        ("softcapping or sinks", "yes" if layout.scored else "no"),
    ]
    return Foreseen(name, None, tuple(facts))


def _config(source: str) -> PreTrainedConfig:
    """A model's configuration. Raises ModelNotFoundError."""
    if source == "default":
        embedded = default_model()
        source = str(unpacked_gguf(embedded) if isinstance(embedded, Path) else embedded)
    path = Path(source)
    if path.suffix == ".gguf":
        raise ModelNotFoundError(
            f"{source} is a GGUF file, whose configuration is read with its weights; use octavo.load"
        )
    folder = str(path.parent) if path.name == "config.json" else source
    if is_missing(folder):
        raise ModelNotFoundError(f"cannot read a configuration from {source}: there is no such folder or file")
    try:
        published = published_config(folder)
        if published is not None:
            return base_config(published, folder)
        # Code of the model's own is not run, and nobody is asked whether it may be.
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config
    except OctavoError:
        raise
    except (OSError, ValueError) as e:
        said = " ".join(str(e).split())
        raise ModelNotFoundError(f"cannot read a configuration from {source}: {said}") from e
    except Exception as e:  # transformers meets impossible settings with whatever error they lead to
        said = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ModelNotFoundError(f"cannot read a configuration from {source}, transformers fails with {said}") from e
