"""What the command line and LangChain write beside a vector, in the row's metadata: values that can be filtered by,

    {"text": "...", "embedded_by": "all-MiniLM-L6-v2", "lang": "en"}

or, where something is neither text, number, bool nor None or has one of the two names, JSON:

    {"text": "...", "model": "all-MiniLM-L6-v2", "metadata": {"tags": ["a", "b"]}}

Each key is left out where there is nothing to say; a row that says nothing has no metadata at all. The model is there
when the command line embedded the text. Other programs write other bytes: those are shown as text and never changed.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from octavo.errors import ConfigError
from octavo.vdb import VectorDatabase

Metadata = bytes | dict[str, Any] | None

_MODEL = "embedded_by"
_KEYS = {"text", "model", "metadata"}


@dataclass(frozen=True)
class Payload:
    """A row's text, the name of the model that embedded it, and whatever else belongs to it (JSON values)."""

    text: str | None = None
    model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def pack(payload: Payload) -> Metadata:
    """A row's metadata; None if there is nothing to keep. Raises ConfigError for what JSON cannot say."""
    said: dict[str, Any] = {"text": payload.text, _MODEL: payload.model}
    said = {key: value for key, value in said.items() if value is not None}
    every = [*said.items(), *payload.metadata.items()]
    if not payload.metadata.keys() & {"text", _MODEL} and all(_is_value(*item) for item in every):
        return {**said, **payload.metadata} or None
    if _MODEL in said:
        said["model"] = said.pop(_MODEL)
    try:
        return json.dumps({**said, "metadata": payload.metadata}, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise ConfigError(f"text and metadata are kept as JSON in UTF-8, which cannot hold this: {e}") from e


def _is_value(key: Any, value: Any) -> bool:
    """Whether a database keeps it as a value: see `octavo.vdb.VectorDatabase.add`."""
    if not isinstance(key, str) or "\0" in key or not _is_utf8(key) or not 1 <= len(key.encode()) <= 255:
        return False
    if isinstance(value, str):
        return _is_utf8(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    if isinstance(value, float):
        return value == value
    return value is None or isinstance(value, int)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def unpack(metadata: Metadata) -> Payload:
    """The payload of a row; bytes that `pack` did not write come back as its text."""
    if metadata is None:
        return Payload()
    if isinstance(metadata, dict):
        named = {key: metadata[key] for key in ("text", _MODEL) if isinstance(metadata.get(key), str)}
        rest = {key: value for key, value in metadata.items() if key not in named}
        return Payload(named.get("text"), named.get(_MODEL), rest)
    said: Any = None
    with suppress(ValueError, RecursionError):
        said = json.loads(metadata)
    if not isinstance(said, dict) or not said or not said.keys() <= _KEYS:
        return Payload(metadata.decode(errors="replace"))
    text, model, others = said.get("text"), said.get("model"), said.get("metadata", {})
    if not isinstance(text, str | None) or not isinstance(model, str | None) or not isinstance(others, dict):
        return Payload(metadata.decode(errors="replace"))
    return Payload(text, model, others)


def model_of(db: VectorDatabase, limit: int | None = None) -> str | None:
    """The model that the first embedded row names; None if none of the first `limit` rows (None: of all) names one.

    Reading all rows takes about 4 seconds per million.
    """
    for row in islice(db, limit):
        if row.metadata and (_MODEL if isinstance(row.metadata, dict) else b'"model"') in row.metadata:
            model = unpack(row.metadata).model
            if model is not None:
                return model
    return None


def parse_condition(text: str) -> dict[str, Any]:
    """A filter from the command line, which is JSON. Raises ConfigError."""
    try:
        said = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"--where is not JSON: {e}") from e
    if not isinstance(said, dict):
        raise ConfigError('--where must be an object, such as {"year": {"$gte": 2020}}')
    return said
