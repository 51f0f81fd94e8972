"""Batches into a database: ids from a file of their own, and errors that name the row's file."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace as changed
from itertools import islice
from pathlib import Path

from octavo.errors import ConfigError, DuplicateIdError, VectorError
from octavo.vdb import VectorDatabase
from octavo.vdb.embed import Embedder
from octavo.vdb.lines import read_text_lines
from octavo.vdb.sources import Batch, read

_REPLACE = "`octavo vdb add --replace` lets a row take the place of those with its id"


def read_all(files: Iterable[Path], embedder: Callable[[], Embedder], ids_from: Path | None) -> Iterator[Batch]:
    """The rows of all files but databases; a line of `ids_from` is the id of each, in place of the files' own.

    Errors as for `read`.
    """
    for path in files:
        if path.suffix == ".vdb":  # its texts may be another model's
            raise ConfigError(f"{path} is a database; `octavo vdb convert` copies one, and two cannot be joined")
    batches = (batch for path in files for batch in read(path, embedder))
    return batches if ids_from is None else _with_ids(batches, ids_from)


def _with_ids(batches: Iterator[Batch], path: Path) -> Iterator[Batch]:
    ids = (text for _, text in read_text_lines(path))
    count = 0
    for batch in batches:
        taken: list[str | None] = [*islice(ids, len(batch.vectors))]
        count += len(taken)
        if len(taken) < len(batch.vectors):
            raise ConfigError(f"{path} has {count} ids, and there are more rows; it needs a line for each")
        yield changed(batch, ids=taken)
    if next(ids, None) is not None:
        raise ConfigError(f"{path} has more ids than the {count} rows; it needs a line for each")


def fill(
    db: VectorDatabase, batches: Iterable[Batch], replace: bool, tell: Callable[[int, int], object] | None = None
) -> int:
    """Add all rows and return how many were read. With `replace`, the last row of an id takes the place of the others.

    `tell` hears now and then how many rows are in, and how many were read.
    Raises VectorError and DuplicateIdError; rows of earlier batches are in the database then, so do not save it.
    """
    count = 0
    for batch in batches:
        kept = _last_of_each_id(batch) if replace else batch
        watch = None if tell is None else _after(count, tell)
        try:
            db.add(kept.vectors.data, ids=kept.ids, metadata=kept.metadata, replace=replace, progress=watch)
        except DuplicateIdError as e:
            raise DuplicateIdError(f"{batch.where}: {_duplicate(db, kept)}") from e
        except VectorError as e:
            raise VectorError(f"{batch.where}: {e}") from e
        count += len(batch.vectors)
        if tell is not None:
            tell(count, count)
    return count


def _after(count: int, tell: Callable[[int, int], object]) -> Callable[[int, int], object]:
    """Tells of a batch that comes after `count` rows."""
    return lambda done, rows: tell(count + done, count + rows)


def _duplicate(db: VectorDatabase, batch: Batch) -> str:
    """What is wrong with the ids of a batch, in the words of the command line."""
    seen = set()
    for name in batch.ids:
        if name and name in db:
            return (
                f"the id {name!r} is in the database already, or came in an earlier row; nothing was added. {_REPLACE}"
            )
        if name and name in seen:
            return f"the id {name!r} is given twice; nothing was added. {_REPLACE}"
        seen.add(name)
    return f"an id is there already; nothing was added. {_REPLACE}"


def _last_of_each_id(batch: Batch) -> Batch:
    last = {name: row for row, name in enumerate(batch.ids) if name}
    chosen = [row for row, name in enumerate(batch.ids) if not name or last[name] == row]
    if len(chosen) == len(batch.ids):
        return batch
    ids, metadata = [batch.ids[row] for row in chosen], [batch.metadata[row] for row in chosen]
    return changed(batch, vectors=batch.vectors[chosen], ids=ids, metadata=metadata)
