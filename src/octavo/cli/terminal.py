"""What the commands share: options, the console, loading with a status line, and checks made before minutes of work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from octavo.errors import ConfigError, OutputFileError, PromptError

console = Console()
Number = TypeVar("Number", int, float)

Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file or hub id; the embedded SmolLM2-135M-Instruct if left out.")
]
AdapterName = Annotated[
    str,
    typer.Option(
        help="Folder, shipped name or hub id; two joined by '+'; 'none'; or 'auto' (dms-8x for the embedded model)."
    ),
]
Budget = Annotated[int | None, typer.Option(help="Bytes that the KV cache may take.")]
ReuseFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of a reuse cache: what was read before, by any process, is not read again."),
]
KvDtype = Annotated[
    str | None,
    typer.Option(help="int8 or fp8 keeps keys and values in half of bf16's bytes; the model's dtype if left out."),
]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default what the device computes in.")]
Device = Annotated[str | None, typer.Option(help="Torch device; CUDA where there is one.")]


def load(
    model: str | None,
    adapter: str,
    dtype: str | None,
    device: str | None,
    budget: int | None,
    kv_dtype: str | None = None,
    reuse: Path | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) with its adapters attached, as the options say. Raises what `octavo.load` raises."""
    from octavo import models

    store = None if reuse is None else store_at(reuse)
    _quiet()
    with console.status("loading the model"):
        return models.load(
            model, None if adapter == "none" else adapter, dtype=dtype_of(dtype), device=device, budget=budget,
            kv_dtype=kv_dtype, reuse=store,
        )  # fmt: skip


def store_at(folder: Path, memory: str | None = "1GiB") -> Any:
    """The reuse store of a folder. Raises OutputFileError where it can neither be read nor made."""
    import octavo

    return octavo.ReuseStore(memory, folder, "20GiB")


def load_plain(model: str | None, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """(model, tokenizer), unattached. Raises what `octavo.models.load_plain` raises."""
    from octavo import models

    _quiet()
    with console.status("loading the model"):
        return models.load_plain(model, dtype=dtype_of(dtype), device=device)


def adapters_of(names: list[str]) -> list[Any]:
    """Adapters by their names, at most one of each kind. Raises AdapterFileError and ConfigError."""
    from octavo.models import find_adapters

    return find_adapters(names)


def numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """The numbers of an option that takes several, separated by commas. Raises ConfigError."""
    try:
        return tuple(kind(n) for n in text.split(",") if n.strip())
    except ValueError as e:
        raise ConfigError(f"{option} takes numbers separated by commas, not {text!r}") from e


def dtype_of(name: str | None) -> Any:
    """The torch dtype of an option; None for None. Raises ConfigError."""
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    if name not in known:
        raise ConfigError(f"dtype must be bf16, fp16 or fp32, not {name}")
    return known[name]


def _quiet() -> None:
    """Turn off the progress bars and messages of transformers, which would break into ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@contextmanager
def reading_input() -> Iterator[None]:
    """Raise PromptError where standard input is not in the terminal's encoding."""
    try:
        yield
    except UnicodeDecodeError as e:
        raise PromptError(f"standard input is not {e.encoding} text: {e.reason}; convert it to {e.encoding}") from e


def check_writable(path: Path, *, make_folder: bool = True, replaced: bool = False) -> None:
    """Raise OutputFileError where `path` cannot be written, before minutes of work whose result would be lost.

    `make_folder`: folders on the way are made. `replaced`: the file will be written aside and renamed, into a folder
    that must be there already.
    """
    if replaced:
        _check_replaceable(path)
        return
    existed = path.exists()
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror}") from e


def _check_replaceable(path: Path) -> None:
    """Raise OutputFileError unless a file beside `path` can be written and take its place."""
    if not path.parent.is_dir():
        raise OutputFileError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        what = "folder" if path.is_dir() else "device or pipe"
        raise OutputFileError(f"cannot write {path}: it is a {what}; give the name of a file")
    try:
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")  # as `Snapshot.save` does
        with aside.open("wb"):
            pass
        aside.unlink()
    except (OSError, ValueError) as e:  # ValueError: no name, or one that no system takes
        raise OutputFileError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
