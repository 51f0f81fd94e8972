"""`octavo bench engine`: the options, and the parts run in turn."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from octavo.cli.terminal import check_writable
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.bench.engine.mixed import Run
    from octavo.bench.engine.steps import Step
    from octavo.bench.engine.subjects import Subject

console = Console(width=None if sys.stdout.isatty() else 140)
progress = Console(stderr=True)

Ways = dict[str, dict[str, Any]]  # settings of `octavo.attach`, by the name in the table


def engine(
    shape: Annotated[str, typer.Option(help="default, or llama8b: its shape, random weights.")] = "default",
    sizes: Annotated[
        str, typer.Option(help="Batch x context of steps, such as 1x8000,8x2000, or nothing.")
    ] = "1x500,8x500",
    kv: Annotated[str, typer.Option(help="Page types with gates: model, int8, fp8.")] = "model,int8",
    steps: Annotated[int, typer.Option(min=3, help="Steps that are timed.")] = 48,
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
    out: Annotated[Path | None, typer.Option(help="JSON file with everything that was measured.")] = None,
) -> None:
    """Measure the engine: steps against the bytes that they must read, and many mixed requests at once."""
    import torch

    from octavo.bench.engine import report
    from octavo.bench.engine.steps import copy_bandwidth
    from octavo.bench.engine.subjects import subject
    from octavo.cli.demo import TEXT
    from octavo.retrofit.data import read_text

    if out is not None:
        check_writable(out, make_folder=False)
    peers = [line for path in peer or [] for line in report.peer_steps(path)]
    pairs, ranges = _pairs(sizes), (_range("prompts", prompts), _range("answers", answers))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    measured = subject(shape, read_text(text or TEXT), place)
    ways = _ways(measured, kv, compile and place == "cuda", place == "cuda")
    bandwidth = copy_bandwidth(torch.device(place))
    found: list[Step] = []
    for batch, context in pairs:
        found += _steps(measured, ways, batch, context, steps, bandwidth, plain)
    runs = _mixed(measured, ways, mixed, *ranges, kv_memory, plain, one_by_one) if mixed else []
    console.print(f"{measured.name} on {report.surroundings()['gpu'] or 'the CPU'}, copies {bandwidth / 1e9:,.0f} GB/s")
    report.show(found, runs, peers, console)
    whole = report.record(measured.name, bandwidth, found, runs, peers)
    if out is not None:
        out.write_text(json.dumps(whole, indent=1) + "\n")
        console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps({"subject": measured.name, "steps": len(found), "mixed": len(runs)}))


def _ways(measured: "Subject", kv: str, compiles: bool, graphs: bool) -> Ways:
    """What is measured: nothing evicted, then the gates with each page type."""
    common = {"cuda_graphs": graphs, "compile": compiles}
    ways: Ways = {"octavo, nothing evicted": {"adapter": None, **common}}
    for name in filter(None, kv.split(",")):
        if name not in ("model", "int8", "fp8"):
            raise ConfigError(f"--kv takes model, int8 and fp8, not {name!r}")
        pages = "" if name == "model" else f", {name}"
        settings = {"adapter": measured.gates, "kv_dtype": None if name == "model" else name, **common}
        ways[f"octavo, {measured.gates.name}{pages}"] = settings
    return ways


def _steps(
    measured: "Subject", ways: Ways, batch: int, context: int, steps: int, bandwidth: float, plain: bool
) -> "list[Step]":
    import torch

    from octavo.bench.engine.steps import engine_step, plain_step

    found = []
    unattached: dict[str, dict[str, Any] | None] = {"unattached": None} if plain else {}
    for name, settings in {**unattached, **ways}.items():
        progress.print(f"{batch} x {context:,}: {name}", style="dim")
        try:
            if settings is None:
                found.append(plain_step(measured, batch, context, steps, bandwidth))
            else:
                found.append(engine_step(name, measured, batch, context, steps, bandwidth, **settings))
        except torch.OutOfMemoryError:
            progress.print(f"{batch} x {context:,}: {name} does not fit", style="yellow")
            torch.cuda.empty_cache()
    return found


def _mixed(
    measured: "Subject", ways: Ways, requests: int, prompts: tuple[int, int], answers: tuple[int, int],
    kv_memory: int | None, plain: bool, alone: bool,
) -> "list[Run]":  # fmt: skip
    from octavo.bench.engine.mixed import continuous, in_engine, load_of, one_by_one

    load = load_of(measured, requests, prompts, answers)
    budget = None if kv_memory is None else kv_memory * 2**20
    runs = []
    if plain and alone:
        progress.print("mixed: generate, one by one", style="dim")
        runs.append(one_by_one(measured, load))
    if plain:
        progress.print("mixed: generate_batch", style="dim")
        config: Any = measured.model.config
        page = 256  # tokens, transformers' own
        token = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * measured.model.dtype.itemsize
        )
        blocks = {} if budget is None else {"num_blocks": max(1, budget // (page * token))}
        runs.append(continuous(measured, load, **blocks))
    for name, settings in ways.items():
        progress.print(f"mixed: {name}", style="dim")
        runs.append(in_engine(name, measured, load, requests, budget=budget, **settings))
    return runs


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
