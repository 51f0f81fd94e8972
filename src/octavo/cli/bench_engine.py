"""`octavo bench engine`: the options, and the parts run in turn."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from rich.console import Console

from octavo.bench.source import surroundings
from octavo.cli.terminal import check_writable
from octavo.errors import CacheBudgetError, ConfigError

if TYPE_CHECKING:
    import torch

    from octavo.bench.engine.mixed import Load, Run
    from octavo.bench.engine.steps import Step
    from octavo.bench.engine.subjects import Subject

console = Console(width=None if sys.stdout.isatty() else 140)
progress = Console(stderr=True)

CODES = ("int8", "fp8")  # pages that hold codes

Found = TypeVar("Found", "Step", "Run")
Ways = dict[str, dict[str, Any]]  # settings of `octavo.attach`, by the name in the table


def engine(
    shape: Annotated[str, typer.Option(help="default, or llama8b: its shape, random weights.")] = "default",
    sizes: Annotated[
        str, typer.Option(help="Batch x context of steps, such as 1x8000,8x2000, or nothing.")
    ] = "1x500,8x500",
    kv: Annotated[str, typer.Option(help="Gates with model, int8, fp8 pages; dense: none.")] = "dense,model,int8",
    swiftkv: Annotated[bool, typer.Option("--swiftkv", help="Measure SwiftKV with gates too.")] = False,
    steps: Annotated[int, typer.Option(min=3, help="Steps that are timed.")] = 48,
    distinct: Annotated[
        int | None, typer.Option(min=1, help="Different prompts of a batch; the others come from a reuse store.")
    ] = None,
    mixed: Annotated[int, typer.Option(min=0, help="Mixed requests at once; 0 for none.")] = 0,
    prompts: Annotated[str, typer.Option(help="Fewest and most tokens of a mixed prompt.")] = "100,6000",
    answers: Annotated[str, typer.Option(help="Fewest and most tokens of its answer.")] = "50,500",
    kv_memory: Annotated[int | None, typer.Option(min=1, help="MiB for keys and values of mixed requests.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile pieces of the layers, on CUDA.")] = False,
    plain: Annotated[bool, typer.Option(help="Measure the unattached model too.")] = True,
    one_by_one: Annotated[bool, typer.Option(help="Give mixed requests to generate one by one too.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    peer: Annotated[list[Path] | None, typer.Option(help="JSON lines of a peer's run, to be shown beside.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text that prompts are made of; the demo's.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file with all figures; a plot lies beside.")] = None,
) -> None:
    """Measure the engine: steps against the bytes that they must read, and many mixed requests at once."""
    from octavo.bench.engine import plot, report
    from octavo.bench.engine.mixed import load_of
    from octavo.bench.engine.steps import check_lengths, copy_bandwidth
    from octavo.bench.engine.subjects import subject
    from octavo.cli.demo import TEXT
    from octavo.retrofit.data import read_text

    if out is not None:
        check_writable(out, make_folder=False)
    peers = [line for path in peer or [] for line in report.peer_steps(path)]
    pairs, ranges, pages = _pairs(sizes), (_range("prompts", prompts), _range("answers", answers)), _page_types(kv)
    measured = subject(shape, read_text(text or TEXT), str(place := _place(device)))
    check_lengths(measured.model, pairs, steps)
    load = load_of(measured, mixed, *ranges) if mixed else None
    ways = _ways(measured, pages, swiftkv, place.type == "cuda", compile)
    bandwidth, where = copy_bandwidth(place), surroundings(place)
    found, runs = cast("tuple[list[Step], list[Run]]", ([], []))

    def keep() -> None:  # after each measurement, since a later one may take too long or too much
        if out is not None:
            whole = report.record(where, measured.name, bandwidth, found, runs, peers)
            out.write_text(json.dumps(whole, indent=1) + "\n")

    keep()
    for batch, context in pairs:
        for step in _steps(measured, ways, batch, context, steps, bandwidth, plain, distinct):
            found.append(step)
            keep()
    for run in _mixed(measured, ways, load, kv_memory, plain, one_by_one) if load else ():
        runs.append(run)
        keep()
    console.print(f"{measured.name} on {where['gpu'] or 'the CPU'}, copies {bandwidth / 1e9:,.0f} GB/s")
    report.show(found, runs, peers, console)
    if out is not None:
        console.print(f"wrote {out} and {plot.plot(out)}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps({"subject": measured.name, "steps": len(found), "mixed": len(runs)}))


def _ways(measured: "Subject", pages: list[str], swiftkv: bool, on_gpu: bool, compile: bool) -> Ways:
    """What is measured: nothing evicted, the gates with each page type, and both with SwiftKV."""
    common: dict[str, Any] = {"cuda_graphs": on_gpu, "compile": compile and on_gpu}
    ways: Ways = {}
    for name in pages:
        pages_of = {"kv_dtype": name if name in CODES else None, **common}
        suffix = f", {name}" if name in CODES else ""
        if name == "dense":
            ways["octavo, nothing evicted"] = {"adapter": None, **pages_of}
        else:
            ways[f"octavo, {measured.gates.name}{suffix}"] = {"adapter": measured.gates, **pages_of}
    if swiftkv:
        ways["octavo, " + " + ".join(a.name for a in measured.skipping)] = {"adapter": [*measured.skipping], **common}
    return ways


def _steps(
    measured: "Subject", ways: Ways, batch: int, context: int, steps: int, bandwidth: float, plain: bool,
    distinct: int | None,
) -> "Iterator[Step]":  # fmt: skip
    from octavo.bench.engine.steps import engine_step, plain_step

    size = measured, batch, context, steps, bandwidth
    if plain:
        yield from _measured(f"{batch} x {context:,}: unattached", lambda: plain_step(*size))
    for name, settings in ways.items():
        yield from _measured(f"{batch} x {context:,}: {name}", partial(engine_step, name, *size, distinct, **settings))


def _mixed(
    measured: "Subject", ways: Ways, load: "Load", kv_memory: int | None, plain: bool, alone: bool
) -> "Iterator[Run]":
    from octavo.bench.engine.mixed import continuous, in_engine, one_by_one

    budget = None if kv_memory is None else kv_memory * 2**20
    if plain and alone:
        yield from _measured("mixed: generate, one by one", lambda: one_by_one(measured, load))
    if plain:
        config: Any = measured.model.config
        page = 256  # tokens, transformers' own
        token = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * measured.model.dtype.itemsize
        )
        blocks = {} if budget is None else {"num_blocks": max(1, budget // (page * token))}
        yield from _measured("mixed: generate_batch", lambda: continuous(measured, load, **blocks))
    for name, settings in ways.items():
        run = partial(in_engine, name, measured, load, len(load.prompts), budget=budget, **settings)
        yield from _measured(f"mixed: {name}", run)


def _measured(what: str, measure: "Callable[[], Found]") -> "Iterator[Found]":
    """What a measurement finds, told on stderr; nothing where it has no room, which is told too."""
    import torch

    progress.print(what, style="dim")
    try:
        found = measure()
    except (torch.OutOfMemoryError, CacheBudgetError) as e:
        progress.print(f"{what} does not fit: {e}", style="yellow", markup=False, highlight=False)
        return
    progress.print(f"{what}: {found.told}", markup=False, highlight=False)
    yield found


def _place(device: str | None) -> "torch.device":
    import torch

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise ConfigError(f"--device takes cpu or cuda, not {device!r}") from e
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device takes cpu or cuda, not {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device}, and PyTorch finds no GPU here")
    return place


def _page_types(kv: str) -> list[str]:
    names = [name for name in kv.split(",") if name]
    for name in names:
        if name not in ("dense", "model", *CODES):
            raise ConfigError(f"--kv takes dense, model, int8 and fp8, not {name!r}")
    return names


def _pairs(sizes: str) -> list[tuple[int, int]]:
    try:
        pairs = [size.lower().partition("x") for size in filter(None, sizes.split(","))]
        found = [(int(batch), int(context)) for batch, _, context in pairs]
    except ValueError as e:
        raise ConfigError(f"--sizes takes batch x context, such as 1x8000,8x2000, not {sizes!r}") from e
    if any(min(pair) < 1 for pair in found):
        raise ConfigError(f"--sizes takes numbers from 1, not {sizes!r}")
    return found


def _range(option: str, text: str) -> tuple[int, int]:
    try:
        low, high = (int(number) for number in text.split(","))
    except ValueError as e:
        raise ConfigError(f"--{option} takes the fewest and the most, such as 100,6000, not {text!r}") from e
    if not 1 <= low <= high:
        raise ConfigError(f"--{option} takes two numbers from 1 in rising order, not {text!r}")
    return low, high
