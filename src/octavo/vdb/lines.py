"""Lines of .txt and .jsonl files, parsed and checked. Knows neither arrays nor models."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import TextFileError


@dataclass(frozen=True)
class Line:
    """A vector or a text to be embedded, or both. `where` names the line in an error."""

    where: str
    vector: list[float] | None = None
    text: str | None = None
    id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank; of a .jsonl file, either all have equally long
    vectors or none has one.

    Raises TextFileError.
    """
    first: Line | None = None
    for number, text in read_text_lines(path):
        where = f"{path}:{number}"
        line = _from_json(text, where) if path.suffix == ".jsonl" else Line(where, text=text)
        first = first or line
        if (line.vector is None) != (first.vector is None):
            raise TextFileError(f"{where}: 'vector' must be in every line of a file or in none")
        if len(line.vector or ()) != len(first.vector or ()):
            found, wanted = len(line.vector or ()), len(first.vector or ())
            raise TextFileError(f"{where}: a vector of {found} numbers, but the first has {wanted}")
        yield line


def read_text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines that are not blank, without the space around them.

    Raises TextFileError.
    """
    try:
        with path.open(encoding="utf-8-sig") as f:
            for number, text in enumerate(f, 1):
                if text := text.strip():
                    yield number, text
    except OSError as e:
        raise TextFileError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise TextFileError(f"cannot read {path}: it is not UTF-8 ({e.reason})") from e


def _from_json(source: str, where: str) -> Line:
    try:
        said = json.loads(source)
    except (ValueError, RecursionError) as e:
        raise TextFileError(f"{where}: not JSON ({e})") from e
    if not isinstance(said, dict):
        raise TextFileError(f"{where}: a line must be an object with 'text' or 'vector'")
    vector, text, name = said.pop("vector", None), said.pop("text", None), said.pop("id", None)
    if vector is None and text is None:
        raise TextFileError(f"{where}: a line must be an object with 'text' or 'vector'")
    if not isinstance(text, str | None):
        raise TextFileError(f"{where}: 'text' must be a string")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise TextFileError(f"{where}: 'id' must be a string or a whole number")
    if vector is not None and not _is_vector(vector):
        raise TextFileError(f"{where}: 'vector' must be a list of numbers")
    return Line(where, vector, text, None if name is None else str(name), said)


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(x) in (int, float) for x in value)
