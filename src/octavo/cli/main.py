"""The command line: every group of commands under `octavo`. A user's mistake is one line on standard error and exit
code 2."""

import contextlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from octavo.cli.cache import app as cache
from octavo.cli.long_suite import app as long_suite
from octavo.cli.measure import app as measure
from octavo.cli.models import app as models
from octavo.cli.retrofit import app as retrofit
from octavo.cli.talk import app as talk
from octavo.cli.terminal import AdapterName, Budget, Device, Dtype, KvDtype, Model, check_writable, console, load
from octavo.errors import ConfigError, OctavoError

app = typer.Typer(
    help="Cheap LLM inference for Hugging Face models.", no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Entry point of the `octavo` command."""
    try:
        app()
    except OctavoError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


@app.command()
def demo(
    model: Model = None,
    adapter: AdapterName = "auto",
    swiftkv: Annotated[bool, typer.Option("--swiftkv", help="Skip layers too: --adapter swiftkv+dms-8x.")] = False,
    file: Annotated[Path | None, typer.Option(help="Text to read instead of the one that ships.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question about the text; may be repeated.")] = None,
    png: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path("octavo-demo.png"),
    budget: Budget = None,
    kv_dtype: KvDtype = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer questions about a long text, with Octavo and without, and show what each costs."""
    from octavo.cli import demo as demonstration
    from octavo.retrofit.data import read_text

    check_writable(png)
    if swiftkv and adapter != "auto":
        raise ConfigError("--swiftkv names the shipped adapters; leave it out and give --adapter both, joined by '+'")
    text = read_text(file or demonstration.TEXT)
    if file is not None and not question:
        raise ConfigError("give at least one --question about your --file")
    chosen, questions = "swiftkv+dms-8x" if swiftkv else adapter, question or demonstration.QUESTIONS
    with TemporaryDirectory(prefix="octavo-demo-") as folder:
        loaded, tokenizer = load(model, chosen, dtype, device, budget, kv_dtype, Path(folder))
        ours, _ = demonstration.run(loaded, tokenizer, text, questions, console, png)
        options = {"model": model, "adapter": chosen, "dtype": dtype, "device": device, "kv_dtype": kv_dtype}
        demonstration.again(loaded, options, Path(folder), text, questions[0], ours, console)


app.add_typer(talk)
app.add_typer(measure)
app.add_typer(long_suite)
app.add_typer(models)
app.add_typer(cache, name="cache")
app.add_typer(retrofit, name="retrofit")
with contextlib.suppress(ImportError):  # octavo.vdb is its C extension, which needs a compiler at installation
    from octavo.cli.bench import app as bench
    from octavo.cli.vdb import app as vdb

    app.add_typer(vdb, name="vdb")
    app.add_typer(bench, name="bench")

if __name__ == "__main__":
    main()
