"""Checkpoints of a run: trained parameters, Adam's moments and the step, in one safetensors file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.errors import OutputFileError, RetrofitError

CHECKPOINT = "checkpoint.safetensors"


def write_checkpoint(
    folder: Path,
    parts: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: dict[str, Any],
) -> None:
    """Write aside and rename, so that an interrupted write leaves the one before. Raises OutputFileError."""
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        tensors |= {f"{part}.{name}": t for name, t in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"adam.{part}.{name}.{key}": value for key, value in state.items()}
    aside = folder / (CHECKPOINT + ".new")
    try:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(whole, aside, metadata={"step": str(step), "settings": json.dumps(settings)})
        aside.replace(folder / CHECKPOINT)
    except OSError as e:
        raise OutputFileError(f"cannot write {folder / CHECKPOINT}: {e.strerror or e}") from e


def read_checkpoint(
    folder: Path, parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> int:
    """Put everything back and return the step.

    Raises RetrofitError where the checkpoint is missing, broken or of other settings.
    """
    path = folder / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
        tensors = load_file(path)
    except Exception as e:  # whatever a broken file makes safetensors raise
        raise RetrofitError(f"cannot resume from {path}: {e}") from e
    if json.loads(metadata["settings"]) != settings:
        raise RetrofitError(f"{path} was made with other settings: {metadata['settings']}")
    for part, module in parts.items():
        module.load_state_dict(_under(f"{part}.", tensors))
        for name, parameter in module.named_parameters():
            state = _under(f"adam.{part}.{name}.", tensors)
            if state:
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    return int(metadata["step"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
