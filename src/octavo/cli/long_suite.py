"""`octavo evaluate --suite long` and `octavo compare`: the long suite with a status line, tables, JSON and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavo.cli.terminal import check_writable, console
from octavo.errors import ConfigError, OutputFileError, TextFileError

ACROSS = 4  # policies beside the dense model in one table, so that it fits into a terminal
app = typer.Typer()


@app.command()
def compare(
    records: Annotated[list[Path], typer.Argument(help="JSON files of 'octavo evaluate --suite long'.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for all of them together.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot of quality against bytes.")] = None,
    table: Annotated[Path | None, typer.Option(help="The table as Markdown.")] = None,
    common: Annotated[bool, typer.Option("--common", help="Only rows that all records have.")] = False,
) -> None:
    """Show what was measured earlier, of one run or of several on the same cases, as one table and plot."""
    from octavo.retrofit.suite.results import merged

    for path in (out, png, table):
        if path is not None:
            check_writable(path)
    together = merged([read_record(path) for path in records], common)
    show(together, console)
    write(together, out, png, table)


def read_record(path: Path) -> Any:
    """The evaluation in a JSON file. Raises TextFileError."""
    from octavo.retrofit.suite import LongEvaluation

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TextFileError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    return LongEvaluation.from_json(record, str(path))


def run(
    model: Any,
    tokenizer: Any,
    text: Path,
    code: Path | None,
    others: Sequence[str],
    chats: Path | None,
    asked: Sequence[str],
    adapters: dict[str, Any],
    settings: Any,
    sample: bool,
    out: Path | None,
    says: Console,
) -> Any:
    """Evaluate and print; the record, the plot and the table beside it where `out` is given. Returns the evaluation.

    The record is written after every policy, so that `compare` shows what an interrupted run has measured.
    """
    from octavo.retrofit.suite import SuiteTexts, evaluate_long, read_suite_text
    from octavo.retrofit.suite.texts import read_chats

    longest = settings.longest
    with says.status("reading the texts") as status:
        named = {}
        for spec in others:
            name, equals, path = spec.partition("=")
            if not equals or not name.strip():
                raise ConfigError(f"--text takes NAME=FILE, not {spec!r}")
            named[name.strip()] = read_suite_text(Path(path), tokenizer, longest)
        prose = read_suite_text(text, tokenizer, longest)
        in_code = None if code is None else read_suite_text(code, tokenizer, longest)
        spoken = read_chats(chats) if chats is not None else None if sample else []
        texts = SuiteTexts(prose, in_code, named, spoken, asked)
        result = evaluate_long(
            model, tokenizer, texts, adapters, settings, lambda what: status.update(escape(f"measuring {what}")),
            lambda so_far: None if out is None else _write_json(so_far, out),
        )  # fmt: skip
    show(result, says)
    if out is not None:
        write(result, out, out.with_suffix(".png"), out.with_suffix(".md"))
    return result


def show(result: Any, says: Console) -> None:
    """Print the table, in parts of `ACROSS` policies with the dense model in each, and the notes."""
    from octavo.retrofit.suite.results import cells

    header, *lines = cells(result)
    s = result.settings
    what = f"NLL past token {s.nll_from:,} to the dense model's; shares of exact answers; ± standard errors"
    title = f"{result.model}: {what}"
    for first in range(2, max(3, len(header)), ACROSS):
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        columns = [1, *range(first, min(first + ACROSS, len(header)))]
        for column in columns:
            table.add_column(escape(header[column]), justify="right", overflow="fold")
        for line in lines:
            table.add_row(escape(line[0]), *(escape(line[column]) for column in columns))
        says.print(table)
    for note in result.notes:
        says.print(escape(note))


def _write_json(result: Any, path: Path) -> None:
    """Aside and renamed, so that there is a whole record at any time. Raises OutputFileError."""
    from octavo.cli.training import write_text

    aside = path.with_name(path.name + ".new")
    write_text(aside, json.dumps(result.to_json()) + "\n")
    try:
        aside.replace(path)
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e


def write(result: Any, record: Path | None, png: Path | None, table: Path | None) -> None:
    """Write the JSON file, the plot and the Markdown table, those that are named. Raises OutputFileError."""
    from octavo.cli import plots
    from octavo.cli.training import write_text
    from octavo.retrofit.suite.results import markdown, points

    if record is not None:
        _write_json(result, record)
    if png is not None:
        plots.quality(points(result), png, f"{result.model}, bytes at {result.settings.held_at:,} tokens")
    if table is not None:
        write_text(table, markdown(result))
    made = [str(path) for path in (record, png, table) if path is not None]
    if made:
        console.print(escape(f"wrote {', '.join(made)}"))
