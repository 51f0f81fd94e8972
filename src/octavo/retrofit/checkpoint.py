"""What a run goes on from: trained parameters, Adam's moments, the step and what they were made with, in one
safetensors file; the log beside it; and Ctrl-C, held back until a step is whole."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.adapter_file import SETTINGS, TENSORS, read_settings
from octavo.errors import AdapterFileError, ConfigError, OutputFileError, RetrofitError

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
FILES = (TENSORS, SETTINGS, CHECKPOINT, LOG)  # what a run leaves in its folder
MOMENTS = ("exp_avg", "exp_avg_sq")


def write_checkpoint(
    folder: Path,
    parts: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    step: int,
    made_with: dict[str, Any],
) -> None:
    """Write aside and rename, so that an interrupted write leaves the one before.

    `made_with`: JSON values by name, which a resumed run must share. Raises OutputFileError.
    """
    tensors: dict[str, Tensor] = {}
    for part, module in parts.items():
        tensors |= {f"{part}.{name}": t for name, t in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"adam.{part}.{name}.{key}": value for key, value in state.items()}
    aside = folder / (CHECKPOINT + ".new")
    try:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(whole, aside, metadata={"step": str(step)} | {k: json.dumps(v) for k, v in made_with.items()})
        aside.replace(folder / CHECKPOINT)
    except (OSError, SafetensorError) as e:  # safetensors has an error of its own for a full disk
        reason = getattr(e, "strerror", None) or e
        raise OutputFileError(f"cannot write {folder / CHECKPOINT}: {reason}; make room for it") from e


def read_checkpoint(
    folder: Path, parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, made_with: dict[str, Any]
) -> int:
    """Put everything back and return the step.

    Raises RetrofitError where the checkpoint is missing or damaged, or was made with something else.
    """
    path = folder / CHECKPOINT
    step, theirs = _metadata(path)
    if isinstance(theirs.get("settings"), dict):
        theirs["settings"].setdefault("exercises", 0.0)  # checkpoints of before had none
        if isinstance(theirs["settings"].get("gates"), dict):
            theirs["settings"]["gates"].setdefault("shift", 0)  # nor this
    differences = list(_differences(theirs, json.loads(json.dumps(made_with))))
    if differences:
        raise RetrofitError(
            f"{path} was made with other settings: {'; '.join(differences)}; "
            "resume with what it was made with, or train in another folder"
        )
    try:
        _restore(load_file(path), parts, optimizer, step)
    except Exception as e:  # whatever a damaged file makes safetensors and torch raise
        raise _unusable(path, e) from e
    return step


def refuse_unfinished(folder: Path) -> None:
    """Raise RetrofitError where `folder` holds a run that is not at its end, which a new run would overwrite."""
    try:
        step, made_with = _metadata(folder / CHECKPOINT)
        steps = int(made_with["settings"]["steps"])
    except (RetrofitError, KeyError, TypeError, ValueError):
        return  # there is none, or none to go on from
    if step < steps:
        raise RetrofitError(
            f"{folder} holds an unfinished run, at step {step} of {steps}; give --resume to go on, or another folder"
        )


def refuse_others(folder: Path, swiftkv: bool, gates_name: str | None) -> None:
    """Raise ConfigError where `folder` holds what a run would overwrite or make useless: another kind of adapter than
    it trains (`swiftkv`: SwiftKV weights), or gates made on SwiftKV weights that it replaces, but for its own.

    What an earlier run of the same kind has left is replaced at the end.
    """
    wanted = "swiftkv" if swiftkv else "dms"
    if _settings(folder).get("kind", wanted) != wanted:
        raise ConfigError(f"{folder} holds another kind of adapter, which would be lost; train in another folder")
    for path in sorted(folder.glob(f"*/{SETTINGS}")) if swiftkv else ():
        if path.parent.name != gates_name and "swiftkv" in _settings(path.parent):
            raise ConfigError(
                f"{path.parent} holds gates that were made on the SwiftKV weights in {folder} and fit no others; train "
                "in another folder"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """Those of an adapter; nothing where there is none, or none that can be read."""
    try:
        return read_settings(folder)
    except AdapterFileError:
        return {}


def read_log(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The log's lines of the first `steps` steps. Raises RetrofitError where one is missing or damaged."""
    path = folder / LOG
    if steps == 0:
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:steps]]
        whole = [line["step"] for line in lines if {"loss", "kl"} <= line.keys()] == list(range(1, steps + 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise RetrofitError(
            f"{path} does not hold one line for each of the steps 1 to {steps}; put it back, or train in another folder"
        )
    return lines


def write_log(folder: Path, line: dict[str, Any]) -> None:
    """Add one step's line; the first step's begins the log anew. Raises OutputFileError."""
    path = folder / LOG
    try:
        with path.open("w" if line["step"] == 1 else "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e


def cut_log(folder: Path, steps: int) -> None:
    """Drop the lines past the first `steps` steps, which will be written again.

    Raises RetrofitError where one before is missing, and OutputFileError.
    """
    path, lines = folder / LOG, read_log(folder, steps)
    aside = folder / (LOG + ".new")
    try:
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        aside.replace(path)
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back and tell on request whether it came: in the middle of a step nothing is worth saving.

    The second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, which alone gets signals, and
    where SIGINT is ignored nothing is held back.
    """
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.getsignal(signal.SIGINT)
    held = threading.current_thread() is threading.main_thread() and callable(before)
    if held:
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        if held:
            signal.signal(signal.SIGINT, before)


def _metadata(path: Path) -> tuple[int, dict[str, Any]]:
    """(step, what it was made with). Raises RetrofitError."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = dict(f.metadata() or {})
        return int(metadata.pop("step")), {name: json.loads(value) for name, value in metadata.items()}
    except Exception as e:  # whatever a damaged file makes safetensors raise
        raise _unusable(path, e) from e


def _unusable(path: Path, error: Exception) -> RetrofitError:
    if not path.exists():
        return RetrofitError(f"cannot resume: there is no {path}; leave --resume out to begin")
    return RetrofitError(f"cannot resume from {path}, which is damaged ({error}); train again without --resume")


def _restore(
    tensors: dict[str, Tensor], parts: dict[str, nn.Module], optimizer: torch.optim.Optimizer, step: int
) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for part, module in parts.items():
        module.load_state_dict(_under(f"{part}.", tensors))
        for name, parameter in module.named_parameters():
            if step == 0 or id(parameter) not in trained:
                continue
            state = _under(f"adam.{part}.{name}.", tensors)
            if "step" not in state or any(key not in state or state[key].shape != parameter.shape for key in MOMENTS):
                raise ValueError(f"Adam's moments of {part}.{name} are missing or of another shape")
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """`name theirs, now ours` of every field that differs, fields of fields with dotted names."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**ours, **theirs}:
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield f"{name} {shorten(str(theirs), 80)}, now {shorten(str(ours), 80)}"


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
