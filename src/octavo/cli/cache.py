"""`octavo cache ...`: what lies in the folder of a reuse cache, or on its server, and what to do with it."""

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from octavo.cli.terminal import Model, console, store_at
from octavo.errors import ConfigError

app = typer.Typer(help="Look at and manage a reuse cache on disk or a server.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Argument(help="Folder of the cache, as given to ReuseStore(disk=...) or --reuse.")
]
Remote = Annotated[str | None, typer.Option(help="Instead of a folder, the URL of a server: redis://host:6379/0.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Tenant = Annotated[str | None, typer.Option(help="Whose requests; by default those of no tenant.")]
Key = Annotated[str | None, typer.Option(help="A record's key as `list` shows it, or its beginning.")]
Text = Annotated[str | None, typer.Option(help="The prompt's text; --model says whose tokenizer reads it.")]


@app.command()
def stats(folder: Folder = None, remote: Remote = None, as_json: AsJson = False) -> None:
    """How many records there are, and their bytes."""
    found = asdict(_opened(folder, remote).stats())
    tier, place = _tier(remote)
    if as_json:
        print(json.dumps({name: found[name] for name in (f"{tier}_records", f"{tier}_nbytes", "damaged")}))
    else:
        told = f"{found[f'{tier}_records']:,} records, {found[f'{tier}_nbytes']:,} B {place}"
        console.print(told, highlight=False)


@app.command("list")
def listed(folder: Folder = None, remote: Remote = None, as_json: AsJson = False) -> None:
    """All records, the one that was used last first; on a server, that which was stored last."""
    found = _opened(folder, remote).list()
    if as_json:
        print(json.dumps([{**asdict(each), "expires": _finite(each.expires), "pinned": _finite(each.pinned)}
                          for each in found]))  # fmt: skip
        return
    table = Table("key", "tokens", "from", "bytes", "tenant", "tags", "stored", "until")
    for each in found:
        stored, pinned = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.created)), each.pinned > time.time()
        until = "pinned" if pinned else "" if each.expires == float("inf") else time.ctime(each.expires)
        tenant, tags = escape(each.tenant), escape(", ".join(each.tags))
        table.add_row(
            each.key[:12], f"{each.tokens:,}", f"{each.first:,}", f"{each.nbytes:,}", tenant, tags, stored, until
        )
    console.print(table)


@app.command()
def explain(
    folder: Folder = None, remote: Remote = None, text: Text = None, model: Model = None, tenant: Tenant = None
) -> None:
    """How far a prompt would hit, and why not further; standard input holds its token ids as JSON without --text."""
    store = _opened(folder, remote)
    with store.request(tenant=tenant):
        told = store.explain(_tokens(text, model))
    console.print(
        f"{told.boundary:,} of {told.length:,} tokens would be reused, {told.matched:,} are equal: {told.reason}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def pin(
    folder: Folder = None,
    remote: Remote = None,
    text: Text = None,
    model: Model = None,
    tenant: Tenant = None,
    ttl: Annotated[float | None, typer.Option(help="For so many seconds; without it, until --undo.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let go of it.")] = False,
) -> None:
    """Keep what a prompt would go on from, whatever else comes; a server's own policy may evict it even so."""
    store = _opened(folder, remote)
    with store.request(tenant=tenant):
        tokens = _tokens(text, model)
        held = store.unpin(tokens) if undo else store.pin(tokens, ttl)
    console.print(f"{held:,} tokens {'let go' if undo else 'pinned'}", highlight=False)


@app.command()
def delete(
    folder: Folder = None,
    remote: Remote = None,
    key: Key = None,
    tag: Annotated[str | None, typer.Option(help="All that was stored under a tag.")] = None,
    tenant: Annotated[str | None, typer.Option(help="All of a tenant.")] = None,
    text: Text = None,
    model: Model = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
) -> None:
    """Delete records; what others go on from stays, cut where they part."""
    if not everything and all(each is None for each in (key, tag, tenant, text)):  # the store's error names arguments
        raise ConfigError("say what to delete: --key, --tag, --tenant or --text, or --all for everything")
    store = _opened(folder, remote)
    before = len(store.list())
    if everything:
        store.clear()
    else:
        prefix = None if text is None else _tokens(text, model)
        store.delete(prefix=prefix, tag=tag, tenant=tenant, key=key)
    console.print(f"{before - len(store.list()):,} records deleted, {len(store.list()):,} left", highlight=False)


@app.command()
def verify(folder: Folder = None, remote: Remote = None) -> None:
    """Read and check every record; what is damaged is dropped. Exit code 1 where anything was."""
    store = _opened(folder, remote)
    known = store.stats().damaged
    wrong = store.verify()
    for each in wrong:
        console.print(each, markup=False, highlight=False, soft_wrap=True)
    store.flush()
    total = store.stats()
    whole = getattr(total, f"{_tier(remote)[0]}_records")
    console.print(f"{whole:,} records are whole, {total.damaged:,} were damaged", highlight=False)
    if wrong or known:
        raise typer.Exit(1)


def _tier(remote: str | None) -> tuple[str, str]:
    """The tier that is looked at, and where it is."""
    return ("disk", "on disk") if remote is None else ("remote", "on the server")


def _opened(folder: Path | None, remote: str | None) -> Any:
    """The store of a folder or a server that must be there. Raises ConfigError."""
    if remote is not None and folder is None:
        import octavo

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            store = octavo.ReuseStore(None, remote=remote)
        if store.index.away:
            raise ConfigError(str(told[-1].message))
        for each in told:
            warnings.warn(each.message, each.category, stacklevel=2)
        return store
    if folder is None or remote is not None:
        raise ConfigError("give either a folder of a reuse cache or --remote and the URL of a server")
    if not folder.expanduser().is_dir():
        raise ConfigError(f"there is no folder {folder}; give one that ReuseStore(disk=...) or --reuse has made")
    return store_at(folder, None)


def _tokens(text: str | None, model: str | None) -> Any:
    """A prompt's ids, from its text or as JSON from standard input. Raises ConfigError."""
    import sys

    if text is not None:
        from octavo.models import load_tokenizer

        return load_tokenizer(model)(text, verbose=False)["input_ids"]
    try:
        return json.loads(sys.stdin.read())
    except ValueError as e:
        raise ConfigError("give --text, or the prompt's token ids as a JSON list on standard input") from e


def _finite(value: float) -> float | None:
    """A time for JSON, which has no infinity."""
    return value if abs(value) != float("inf") else None
