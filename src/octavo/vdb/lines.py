"""Lines of .txt, .jsonl and .csv files, parsed and checked. Knows neither arrays nor models."""

import csv
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
    """The lines of a file that are not blank; either all have equally long vectors or none has one.

    Raises TextFileError.
    """
    first: Line | None = None
    for line in _parsed(path):
        where = line.where
        first = first or line
        if (line.vector is None) != (first.vector is None):
            raise TextFileError(f"{where}: 'vector' must be in every line of a file or in none")
        if len(line.vector or ()) != len(first.vector or ()):
            found, wanted = len(line.vector or ()), len(first.vector or ())
            raise TextFileError(f"{where}: a vector of {found} numbers, but the first has {wanted}")
        yield line


def _parsed(path: Path) -> Iterator[Line]:
    if path.suffix == ".csv":
        yield from _from_csv(path)
        return
    for number, text in read_text_lines(path):
        where = f"{path}:{number}"
        yield _from_json(text, where) if path.suffix == ".jsonl" else Line(where, text=text)


def _from_csv(path: Path) -> Iterator[Line]:
    """Lines of numbers are vectors. Otherwise the first line names columns: `text` or `vector` (numbers with spaces
    between), maybe `id`; the others are metadata, numbers where they read as such, and left out where they are empty.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, strict=True)
            names: list[str] | None = None
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if not any(fields):
                    continue
                if names is None and all(isinstance(_number(each), int | float) for each in fields):
                    names = []
                elif names is None:
                    names = [name.strip() for name in fields]
                    if not {"text", "vector"} & set(names) or len(set(names)) < len(names):
                        raise TextFileError(
                            f"{where}: the first line must name columns, each once, 'text' or 'vector' too"
                        )
                    continue
                yield _from_fields(fields, names, where)
    except OSError as e:
        raise TextFileError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise TextFileError(f"cannot read {path}: it is not UTF-8 ({e.reason})") from e
    except csv.Error as e:
        raise TextFileError(f"{path}: it is no CSV file ({e})") from e


def _from_fields(fields: list[str], names: list[str], where: str) -> Line:
    if not names:
        return Line(where, vector=_numbers(fields, where))
    if len(fields) != len(names):
        raise TextFileError(f"{where}: {len(fields)} fields, but the first line names {len(names)}")
    said = dict(zip(names, fields, strict=True))
    vector, text, name = said.pop("vector", None), said.pop("text", None), said.pop("id", None)
    metadata = {key: _number(field) for key, field in said.items() if field}
    return Line(where, None if vector is None else _numbers(vector.split(), where), text, name or None, metadata)


def _numbers(fields: list[str], where: str) -> list[float]:
    found = [_number(field) for field in fields]
    numbers = [number for number in found if isinstance(number, int | float)]
    if not numbers or len(numbers) < len(found):
        raise TextFileError(f"{where}: a vector must be numbers alone")
    return numbers


def _number(field: str) -> int | float | str:
    """A field as the number that it reads as; "nan" and "infinity" are text."""
    for kind in (int, float):
        try:
            number = kind(field)
        except ValueError:
            continue
        if "_" not in field and number - number == 0:
            return number
    return field


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
