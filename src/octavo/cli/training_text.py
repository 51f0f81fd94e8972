"""Where the text of `octavo retrofit` comes from: files of the user, and what the model samples itself."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from octavo.attachment.supported import check_supported
from octavo.errors import ConfigError, RetrofitError, RetrofitInterrupted
from octavo.retrofit import sampling
from octavo.retrofit.checkpoint import CHECKPOINT
from octavo.retrofit.data import Source, load_source, parse_mix, source_names
from octavo.retrofit.sampling import SamplingSettings
from octavo.retrofit.settings import RetrofitSettings
from octavo.retrofit.start import check_length


@dataclass(frozen=True)
class TrainingText:
    """The user's `files` ('path' or 'path:share'), and whether the model samples `tokens` more, None: as many as do.

    Raises ConfigError where nothing is left to train on.
    """

    files: list[str]
    sampled: bool = True
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.sampled and not self.files:
            raise ConfigError("nothing to train on: give --data, or leave --no-sampled out and the model samples text")
        if not self.sampled and self.tokens is not None:
            raise ConfigError("--sample-tokens is for text that the model samples; leave --no-sampled out")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"--sample-tokens must be at least 1, not {self.tokens}")


def gather(
    text: TrainingText,
    model: PreTrainedModel,
    tokenizer: Any,
    settings: RetrofitSettings,
    folder: Path,
    resume: bool,
    console: Console,
) -> tuple[list[Source], dict[str, Any]]:
    """(the sources of a run, the user's first; what its card says of the sampled ones, by "sampled").

    All that can be refused is refused before the sampling. Raises what `load_source` and `sampling.sample` raise,
    ConfigError, UnsupportedModelError and RetrofitInterrupted.
    """
    check_supported(model)
    check_length(model, settings.length)
    sources = _files(text.files, tokenizer, settings.length, console)
    if not text.sampled or (resume and sources and _began_without(folder)):
        return sources, {}
    if resume and not (folder / sampling.RECORD).exists():
        raise RetrofitError(
            f"cannot resume: {folder} holds no text that the model sampled; give the --data that the run was trained "
            "on, or leave --resume out to begin"
        )
    least = 4 * settings.length  # so that each kind of text fills a row
    amount = sampling.amount_for(settings, model.device.type) if text.tokens is None else max(text.tokens, least)
    asked = SamplingSettings(amount, settings.seed)
    asked = replace(asked, batch=sampling.batch_for(model, amount, asked.max_new_tokens))
    _sample(model, tokenizer, asked, folder, resume, console)
    sampled, said = sampling.load_sampled(tokenizer, asked, folder, settings.length)
    if _first_process(model):
        kinds = ", ".join(f"{said[kind]:,} {kind}" for kind in ("chats", "completions") if kind in said)
        console.print(escape(f"{said['tokens']:,} tokens sampled: {kinds}, in {folder / sampling.TEXT}"))
        for note in said["notes"]:
            console.print(escape(note))
    return sources + sampled, {"sampled": said}


def _files(specs: list[str], tokenizer: Any, length: int, console: Console) -> list[Source]:
    with console.status("reading the data"):
        mix = parse_mix(specs)
        loaded = [load_source(path, tokenizer, length, share) for path, share in mix]
        names = source_names([path for path, _ in mix])
        return [replace(source, name=name) for source, name in zip(loaded, names, strict=True)]


def _began_without(folder: Path) -> bool:
    """Whether the run in `folder`, or one below it of a search, has trained on files alone."""
    trained = [*folder.glob(CHECKPOINT), *folder.glob(f"*/{CHECKPOINT}")]
    return bool(trained) and not (folder / sampling.RECORD).exists()


def _first_process(model: PreTrainedModel) -> bool:
    return bool(PartialState(cpu=model.device.type == "cpu").is_main_process)  # on the device that training will use


def _sample(
    model: PreTrainedModel, tokenizer: Any, asked: SamplingSettings, folder: Path, resume: bool, console: Console
) -> None:
    """Sample with a progress bar, in one process of several; the others wait."""
    if not _first_process(model):
        sampling.wait(model, tokenizer, asked, folder)
        return
    columns = (TextColumn("sampling"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=asked.tokens)

        def show(tokens: int) -> None:
            bar.update(task, completed=tokens, description=f"{tokens:,} of {asked.tokens:,} tokens")

        try:
            sampling.sample(model, tokenizer, asked, folder, resume, show)
        except KeyboardInterrupt as e:
            raise RetrofitInterrupted(
                f"stopped while sampling; {folder / sampling.TEXT} keeps what there is, and the same command goes on"
            ) from e
