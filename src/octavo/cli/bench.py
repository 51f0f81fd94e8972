"""`octavo bench`: its commands, of which `vdb` is here: the options, and the parts run in turn."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from octavo.cli.bench_engine import engine
from octavo.cli.bench_reuse import reuse
from octavo.cli.terminal import check_writable
from octavo.errors import ConfigError
from octavo.vdb import set_kernels

if TYPE_CHECKING:
    from octavo.bench.vdb.data import Vectors
    from octavo.bench.vdb.timing import Measurement

app = typer.Typer(help="Measure Octavo against others.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 140)
progress = Console(stderr=True)

Found = tuple[list["Measurement"], dict[str, str]]  # and what was left out, with the reason
PARTS = ("exact", "graph", "calls", "files")


@dataclass(frozen=True)
class Settings:
    """What to measure. `rows` and `dims` of None are each part's own: the sizes of the bars, or small ones if quick."""

    parts: tuple[str, ...] = PARTS
    rows: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    threads: tuple[int, ...] = (1, 2)
    k: int = 10
    rounds: int = 7
    builds: int = 1
    storages: tuple[str, ...] = ("f32", "f32+i8")
    vectors: Path | None = None
    folder: Path | None = None
    memory: float | None = None  # bytes
    sample: float | None = None  # seconds that one sample takes at least; each part's own if None
    quick: bool = False


Part = Callable[[Settings, Callable[[str], None]], Found]


app.command()(engine)
app.command()(reuse)


@app.command()
def vdb(
    part: Annotated[str, typer.Option(help=f"What to measure: {', '.join(PARTS)}.")] = ",".join(PARTS),
    rows: Annotated[str | None, typer.Option(help="Rows, for every part; by default the sizes of the bars.")] = None,
    dims: Annotated[str | None, typer.Option(help="Numbers in a vector, likewise.")] = None,
    batch: Annotated[str | None, typer.Option(help="Queries at a time in exact search, such as 1,100.")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Rows to find.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured.")] = 7,
    builds: Annotated[int, typer.Option(min=1, help="Times that every graph is built.")] = 1,
    storage: Annotated[str, typer.Option(help="Octavo's storages in exact search.")] = "f32,f32+i8",
    vectors: Annotated[
        Path | None,
        typer.Option(help="Embeddings for graph and exact: a .npy of rows x dims; its last 1,000 are queries."),
    ] = None,
    kernels: Annotated[str | None, typer.Option(help="Octavo's kernels, such as avx512 without AMX.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where files are written; the temporary folder if left out.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB that the engines of exact search may hold; half of what is free.")
    ] = None,
    sample: Annotated[float | None, typer.Option(help="Seconds that one sample takes at least; 0.05 to 0.2.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and 3 rounds: a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file with everything that was measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for recall against speed of the graphs.")] = None,
    show: Annotated[
        Path | None, typer.Option(help="JSON file of an earlier run to print or plot; nothing is measured.")
    ] = None,
) -> None:
    """Measure the vector database beside numpy, faiss, usearch, hnswlib and sqlite-vec."""
    for path in (out, plot):
        if path is not None:
            check_writable(path, make_folder=False)
    if show is not None:
        from octavo.bench.vdb import report

        _tell(report.load(show), None, plot)
        return
    parts = tuple(name.strip() for name in part.split(","))
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"--part takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    settings = Settings(
        parts, _numbers("rows", rows), _numbers("dims", dims), _numbers("batch", batch),
        _numbers("threads", threads) or (1,), k, min(rounds, 3) if quick else rounds, builds,
        tuple(storage.split(",")), vectors, folder, None if memory is None else memory * 1e9,
        sample or (0.03 if quick else None), quick,
    )  # fmt: skip
    set_kernels(kernels)
    try:
        found = run(settings, lambda words: progress.print(words, style="dim", markup=False, highlight=False))
    finally:
        set_kernels(None)
    _tell(found, out, plot)


def run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything that is asked for; `say` hears what is being done. The record, as `report` knows it."""
    from octavo.bench.vdb.timing import prepare_process

    prepare_process()
    from octavo.bench.vdb import report

    around = report.surroundings()
    parts: dict[str, Part] = {"exact": _exact, "graph": _graph, "calls": _calls, "files": _files}
    measured: list[Measurement] = []
    left_out: dict[str, dict[str, str]] = {}
    for name in settings.parts:
        some, left_out[name] = parts[name](settings, say)
        measured += some
    return report.record(around, measured, left_out)


def _exact(settings: Settings, say: Callable[[str], None]) -> Found:
    from octavo.bench.vdb import exact
    from octavo.bench.vdb.data import from_file, normalised, random_directions

    usual = [(20_000, 384, (1, 100))] if settings.quick else [(100_000, 384, (1, 100)), (1_000_000, 384, (1,))]
    if settings.rows or settings.dims:
        usual = [(n, d, (1, 100)) for n in settings.rows or (100_000,) for d in settings.dims or (384,)]
    sizes = [(n, d, settings.batches or batches) for n, d, batches in usual]
    measured: list[Measurement] = []
    left_out: dict[str, str] = {}

    def measure(vectors: "Vectors", batches: tuple[int, ...]) -> None:
        size = f"{len(vectors.rows):,} x {vectors.rows.shape[1]}"
        say(f"exact: {size}, {vectors.name}")
        _check_k(settings, len(vectors.rows))
        if max(batches) > len(vectors.queries):
            raise ConfigError(f"a batch of {max(batches)} needs as many queries; there are {len(vectors.queries)}")
        budget = settings.memory or _free_memory() / 2
        aim = settings.sample or exact.SAMPLE_AIM
        some, missing = exact.measure(
            vectors, settings.k, batches, settings.threads, settings.rounds, settings.storages, budget, aim
        )
        measured.extend(some)
        left_out.update({f"{name}, {size}": reason for name, reason in missing.items()})

    for n, d, batches in sizes:
        measure(random_directions(n, d, max(100, *batches)), batches)
    if settings.vectors is not None:
        given = from_file(settings.vectors, max(settings.rows) if settings.rows else 20_000 if settings.quick else None)
        normalised(given.rows)
        normalised(given.queries)
        measure(given, settings.batches or (1, 100))
    return measured, left_out


def _graph(settings: Settings, say: Callable[[str], None]) -> Found:
    from octavo.bench.vdb import graph
    from octavo.bench.vdb.data import HELD_OUT, clusters, from_file

    rows = max(settings.rows) if settings.rows else 5_000 if settings.quick else None
    queries = 200 if settings.quick else HELD_OUT
    if settings.vectors is not None:
        given = from_file(settings.vectors, rows, queries)
    else:
        dims = max(settings.dims) if settings.dims else 64 if settings.quick else 256
        given = clusters(rows or 100_000, dims, queries)
    _check_k(settings, len(given.rows))
    say(f"graph: {len(given.rows):,} x {given.rows.shape[1]}, {given.name}")
    efs = graph.EFS[::2] if settings.quick else graph.EFS
    aim = settings.sample or graph.SAMPLE_AIM
    return graph.measure(given, settings.k, settings.threads, settings.rounds, settings.builds, efs, aim)


def _calls(settings: Settings, say: Callable[[str], None]) -> Found:
    from octavo.bench.vdb import overhead

    say("calls: one query, ten rows")
    aim = settings.sample or overhead.SAMPLE_AIM
    return overhead.calls(settings.dims or (64, 384), min(settings.k, 10), settings.rounds, aim)


def _files(settings: Settings, say: Callable[[str], None]) -> Found:
    from octavo.bench.vdb.overhead import files

    measured: list[Measurement] = []
    for rows in settings.rows or ((50_000,) if settings.quick else (1_000_000,)):
        for dims in settings.dims or (128,):
            say(f"files: {rows:,} x {dims}")
            measured += files(rows, dims, settings.rounds, settings.folder)
    return measured, {}


def _tell(found: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    from octavo.bench.vdb import report

    report.show(found, console)
    if out is not None:
        report.save(found, out)
        console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)
    if plot is not None:
        report.draw(found if out is None else report.load(out), plot)
        console.print(f"wrote {plot}", markup=False, highlight=False, soft_wrap=True)
    print(report.headline(found))


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(number.replace("_", "")) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--{option} takes numbers separated by commas, not {text!r}") from error
    if min(found) < 1:
        raise ConfigError(f"--{option} takes numbers from 1, not {text!r}")
    return found


def _check_k(settings: Settings, rows: int) -> None:
    if settings.k > rows:
        raise ConfigError(f"--k {settings.k} needs as many rows; there are {rows}")


def _free_memory() -> float:
    """Bytes that can be had without swapping; 8 GB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8e9
