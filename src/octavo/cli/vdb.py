"""`octavo vdb`: databases made, filled, asked, checked and converted from the shell.

A database is changed in memory and saved at the end, whole or not at all; whatever fails leaves the file as it was. Of
two commands that change a file the second waits for the first.
Numpy, torch and models are imported by the commands that need them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from octavo.cli.terminal import check_writable, console
from octavo.errors import ConfigError, OutputFileError
from octavo.vdb import VectorDatabase
from octavo.vdb import verify as verify_file
from octavo.vdb.rows import model_of, parse_condition, unpack

if TYPE_CHECKING:
    from octavo.vdb.embed import Embedder

app = typer.Typer(help="Make and search vector databases.", no_args_is_help=True, pretty_exceptions_enable=False)

METRICS = ("cosine", "euclidean", "dot")
LOOK_AT = 1000  # rows are asked for their model by `info`, which should answer at once

Database = Annotated[Path, typer.Argument(help="The database, a .vdb file.")]
Files = Annotated[
    list[Path] | None,
    typer.Argument(
        help=".npy, .fvecs and .bvecs (vectors), .jsonl and .csv ('vector' or 'text', maybe 'id'; the rest is "
        "metadata), .txt (a text per line).",
    ),
]
Metric = Annotated[str, typer.Option(help="cosine, euclidean or dot.")]
Storage = Annotated[str, typer.Option(help="f32, f32+i8 (same answers, three times the speed), f16, bf16 or i8.")]
Index = Annotated[str, typer.Option(help="flat (reads every row) or hnsw (a graph).")]
IdsFrom = Annotated[Path | None, typer.Option(help="Text file with an id per line, one for each row of the files.")]
Where = Annotated[
    str | None,
    typer.Option(help="""Condition on metadata, as JSON: '{"year": {"$gte": 2020}, "lang": {"$in": ["fr", "ru"]}}'."""),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="What embeds text: minilm (384 numbers, reads 256 word pieces of a text) or static (256 numbers, faster). "
        "Each row remembers its model and the database goes on with it; minilm for the first texts."
    ),
]


@app.command()
def create(
    path: Database,
    files: Files = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Numbers in a vector; those of the first file if left out.")
    ] = None,
    metric: Metric = "cosine",
    storage: Storage = "f32",
    index: Index = "flat",
    ids_from: IdsFrom = None,
    model: Model = None,
) -> None:
    """Make a database, empty or from files."""
    if path.exists():
        raise OutputFileError(f"{path} exists; `octavo vdb add` adds to it")
    check_writable(path.resolve(), replaced=True)
    if dimensions is None and not files:
        raise ConfigError("give --dimensions, or files to take them from")
    settings: dict[str, Any] = {"metric": metric, "storage": storage, "index": index}
    db = VectorDatabase(1 if dimensions is None else dimensions, **settings)  # mistakes show before a file is read
    if not files:
        db.save(str(path), mode="new")
        _say(path, 0, db)
        return
    from octavo.vdb.ingest import fill, read_all
    from octavo.vdb.sources import split_width

    with _bar("reading") as tell:
        batches = read_all(files, _embedder(None, model), ids_from)
        if dimensions is None:
            width, batches = split_width(batches)
            db = VectorDatabase(width, **settings)
        added = fill(db, batches, replace=False, tell=tell)
        db.save(str(path), mode="new")
    _say(path, added, db)


@app.command()
def add(
    path: Database,
    files: Annotated[list[Path], typer.Argument(help="As for `octavo vdb create`.")],
    replace: Annotated[bool, typer.Option("--replace", help="Rows take the place of those with their id.")] = False,
    ids_from: IdsFrom = None,
    model: Model = None,
) -> None:
    """Add the rows of files: all, or none if one of them cannot be added."""
    from octavo.vdb.ingest import fill, read_all

    with _changed(path) as db, _bar("reading") as tell:
        added = fill(db, read_all(files, _embedder(db, model), ids_from), replace, tell)
    _say(path, added, db)


@app.command()
def search(
    path: Database,
    query: Annotated[list[str] | None, typer.Argument(help="Text to embed.")] = None,
    vector_file: Annotated[Path | None, typer.Option(help="File with query vectors in place of a text.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Rows to find for each query.")] = 5,
    exact: Annotated[bool, typer.Option("--exact", help="Read every row although there is a graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per line.")] = False,
    where: Where = None,
    model: Model = None,
) -> None:
    """Find the nearest rows to a text or to vectors. Distances: 1 - cosine, Euclidean, or minus the dot product."""
    if bool(query) == (vector_file is not None):
        raise ConfigError("give a text to search for, or --vector-file, and not both")
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    from octavo.vdb.sources import open_any, read_vectors

    condition = None if where is None else parse_condition(where)
    with open_any(path) as db:
        if vector_file is not None:
            vectors = read_vectors(vector_file)
        else:
            with console.status("reading"):
                vectors = _embedder(db, model)().embed([" ".join(query or ())])
        hits = list(db.search(vectors.data, k=k, filter=condition, exact=exact, with_metadata=True))
    found = [(number, hit) for number, of_query in enumerate(hits) for hit in of_query]
    if as_json:
        for number, hit in found:
            print(json.dumps({**({} if vector_file is None else {"query": number}), **_shown(hit)}))
    else:
        console.print(_table(found, len(hits) > 1))


@app.command()
def remove(
    path: Database,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of rows to remove.")] = None,
    ids_from: Annotated[Path | None, typer.Option(help="Text file with an id per line.")] = None,
    where: Where = None,
) -> None:
    """Remove rows, by their ids (all of them, or none if one is not there) or by a condition."""
    from octavo.vdb.lines import read_text_lines

    names = [*(ids or []), *(() if ids_from is None else (text for _, text in read_text_lines(ids_from)))]
    if bool(names) == (where is not None):
        raise ConfigError("give ids to remove, or --where, and not both")
    with _changed(path) as db:
        removed = db.remove(names) if where is None else db.remove(filter=parse_condition(where))
    said = f"{path}: {removed:,} rows removed, {len(db):,} in all"
    console.print(said, soft_wrap=True, markup=False, highlight=False)


@app.command()
def compact(path: Database) -> None:
    """Give the room of removed rows back; the others get new indices."""
    before = path.stat().st_size if path.exists() else 0
    with _changed(path) as db:
        db.compact()
    said = f"{path}: {len(db):,} rows, {path.stat().st_size:,} B (were {before:,} B)"
    console.print(said, soft_wrap=True, markup=False, highlight=False)


@app.command()
def export(
    path: Database,
    target: Annotated[Path, typer.Argument(help=".jsonl (rows whole), or .npy or .fvecs (the vectors alone).")],
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a database's rows to a file that other programs read."""
    if target.suffix not in (".jsonl", ".npy", ".fvecs"):
        raise ConfigError(f"{target}: rows are exported to .jsonl, .npy and .fvecs files; `convert` makes a .vdb")
    convert(path, target, force=force)


@app.command()
def info(path: Database) -> None:
    """Say what is in a database."""
    from octavo.vdb.sources import open_any

    with open_any(path) as db:
        facts, model = db.info(), model_of(db, LOOK_AT)
    table = Table(box=None, show_header=False, pad_edge=False)
    lines = {
        "rows": f"{facts.count:,}" + (f" ({facts.slots:,} slots)" if facts.slots != facts.count else ""),
        "dimensions": f"{facts.dimensions:,}",
        "metric": METRICS[facts.metric],
        "storage": facts.storage,
        "index": facts.index + (f", {facts.links} links" if facts.index == "hnsw" else ""),
        "ids": "yes" if facts.has_ids else "none",
        "model": model or f"none named in the first {min(LOOK_AT, facts.count):,} rows",
        "vectors": f"{facts.vector_bytes:,} B",
        "file": f"{path.stat().st_size:,} B",
    }
    for name, value in lines.items():
        table.add_row(name, Text(value))
    console.print(table)


@app.command()
def verify(path: Database) -> None:
    """Read a whole file and every checksum in it."""
    verify_file(str(path))
    console.print(f"{path}: sound", soft_wrap=True, markup=False, highlight=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help=".vdb of any format, .npy, .fvecs, .bvecs, .csv or .jsonl vectors.")],
    target: Annotated[Path, typer.Argument(help=".vdb or .jsonl, or .npy or .fvecs for the vectors alone.")],
    metric: Annotated[str | None, typer.Option(help="For a .vdb; that of the source, or cosine, if left out.")] = None,
    storage: Annotated[str | None, typer.Option(help="For a .vdb; that of the source, or f32, if left out.")] = None,
    index: Annotated[str | None, typer.Option(help="For a .vdb; that of the source, or flat, if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the target if it exists.")] = False,
) -> None:
    """Write a file's rows in another format, storage or index."""
    from octavo.vdb.export import write
    from octavo.vdb.ingest import fill
    from octavo.vdb.sources import no_texts, open_any, read, split_width

    if target.exists() and not force:
        raise OutputFileError(f"{target} exists; --force replaces it")
    check_writable(target.resolve(), replaced=True)
    chosen: dict[str, Any] = {"metric": metric, "storage": storage, "index": index}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen and target.suffix != ".vdb":
        raise ConfigError(f"{target} is no .vdb file: it has no {' or '.join(chosen)}")
    with _bar("converting") as tell:
        if source.suffix == ".vdb":
            with open_any(source) as db:
                facts = db.info()
            width, batches = facts.dimensions, read(source, no_texts)
            links = {"links": facts.links, "build_effort": facts.build_effort}
            chosen = {"metric": facts.metric, "storage": facts.storage, "index": facts.index, **links, **chosen}
        else:
            width, batches = split_width(read(source, no_texts))
        if target.suffix == ".vdb":
            db = VectorDatabase(width, **chosen)
            count = fill(db, batches, replace=False, tell=tell)
            db.save(str(target), mode="any" if force else "new")
        else:
            count = write(target, batches, width)
    alone = source.suffix in (".vdb", ".jsonl", ".csv") and target.suffix not in (".vdb", ".jsonl")
    said = f"{target}: {count:,} rows" + (", without ids and metadata" if alone else "")
    console.print(said, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar, and a function that is told how much is done and how much there is; nothing of it stays."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _changed(path: Path) -> Iterator[VectorDatabase]:
    """A database in memory, which is saved at the end unless something was raised; others wait meanwhile."""
    from octavo.vdb.locks import locked

    with locked(path, lambda: _say_waiting(path)):
        with _bar("opening") as tell:
            db = VectorDatabase.open(str(path), progress=tell)
        check_writable(path.resolve(), replaced=True)
        yield db
        db.save()


def _embedder(db: VectorDatabase | None, model: str | None) -> "Callable[[], Embedder]":
    """A function that loads the model of the database, or the chosen one, when it is first called.

    It raises ConfigError if the two differ, if neither is known, or if the model's vectors do not fit.
    """

    @cache
    def load() -> "Embedder":
        from octavo.vdb.embed import choose, load_embedder

        named = None if db is None else model_of(db)
        if named is None and model is None and db is not None and len(db):
            raise ConfigError("no row of this database says which model embedded it; give --model if you know")
        name = choose(model, named)
        found = load_embedder(name)
        if db is not None and found.dimensions != db.dimensions:
            raise ConfigError(f"{name} makes vectors of {found.dimensions} numbers; the database has {db.dimensions}")
        return found

    if model is not None:
        from octavo.vdb.embed import choose

        choose(model, None)  # a mistake shows although there may be no text
    return load


def _shown(hit: dict[str, Any]) -> dict[str, Any]:
    payload = unpack(hit["metadata"])
    found = {"index": hit["index"], "distance": hit["distance"], "id": hit["id"]}
    return {**found, "text": payload.text, "metadata": payload.metadata}


def _table(found: list[tuple[int, dict[str, Any]]], several: bool) -> Table:
    """A line per row found; columns that would be empty are left out. Texts are cut to a line."""
    lines = []
    for number, hit in found:
        shown = _shown(hit)
        said = json.dumps(shown["metadata"], ensure_ascii=False) if shown["metadata"] else ""
        cells = {"query": str(number), "distance": f"{shown['distance']:.4f}", "index": str(shown["index"])}
        lines.append(
            {**cells, "id": shown["id"] or "", "text": " ".join((shown["text"] or "").split()), "metadata": said}
        )
    table = Table()
    names = ["query"] if several else []
    names += ["distance", "index", *(name for name in ("id", "text", "metadata") if any(line[name] for line in lines))]
    for name in names:
        numeric = name in ("query", "distance", "index")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
    for line in lines:
        table.add_row(*(Text(line[name]) for name in names))
    return table


def _say_waiting(path: Path) -> None:
    console.print(f"{path}: waiting for another command to finish with it", soft_wrap=True, markup=False)


def _say(path: Path, added: int, db: VectorDatabase) -> None:
    said = f"{path}: {added:,} rows added, {len(db):,} in all, {db.dimensions} dimensions"
    console.print(said, soft_wrap=True, markup=False, highlight=False)
