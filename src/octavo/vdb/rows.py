"""What the command line and LangChain write beside a vector: JSON in the row's metadata.

    {"text": "...", "model": "all-MiniLM-L6-v2", "metadata": {"lang": "en"}}

Each key is left out where there is nothing to say; a row that says nothing has no metadata at all. `model` is there
when the command line embedded the text. Other programs write other bytes: those are shown as text and never changed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from octavo.errors import ConfigError, UnknownIdError
from octavo.vdb import Row, VectorDatabase

_KEYS = {"text", "model", "metadata"}


@dataclass(frozen=True)
class Payload:
    """A row's text, the name of the model that embedded it, and whatever else belongs to it (JSON values)."""

    text: str | None = None
    model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def pack(payload: Payload) -> bytes | None:
    """The bytes for a row's metadata; None if there is nothing to keep. Raises ConfigError for what JSON cannot say."""
    said = {"text": payload.text, "model": payload.model, "metadata": payload.metadata or None}
    said = {key: value for key, value in said.items() if value is not None}
    try:
        return json.dumps(said, ensure_ascii=False).encode() if said else None
    except (TypeError, ValueError, RecursionError) as e:
        raise ConfigError(f"text and metadata are kept as JSON in UTF-8, which cannot hold this: {e}") from e


def unpack(metadata: bytes | None) -> Payload:
    """The payload of a row; bytes that `pack` did not write come back as its text."""
    if metadata is None:
        return Payload()
    try:
        said = json.loads(metadata)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not said or not said.keys() <= _KEYS:
        return Payload(metadata.decode(errors="replace"))
    text, model, others = said.get("text"), said.get("model"), said.get("metadata", {})
    if not isinstance(text, str | None) or not isinstance(model, str | None) or not isinstance(others, dict):
        return Payload(metadata.decode(errors="replace"))
    return Payload(text, model, others)


def rows(db: VectorDatabase) -> Iterator[Row]:
    """Every row, in the order of the indices. Rows may be removed meanwhile."""
    for index in range(db.info().slots):
        try:
            row = db.get(index=index)
        except UnknownIdError:  # removed
            continue
        yield row


def model_of(db: VectorDatabase, limit: int | None = None) -> str | None:
    """The model that the first embedded row names; None if none of the first `limit` rows (None: of all) names one.

    Reading all rows takes about 4 seconds per million.
    """
    for row in islice(rows(db), limit):
        if row.metadata and b'"model"' in row.metadata:
            model = unpack(row.metadata).model
            if model is not None:
                return model
    return None
