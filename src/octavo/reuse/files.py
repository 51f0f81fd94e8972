"""A record's file, as docs/formats.md specifies it byte by byte: a head that is read when a store opens, then slots."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ReuseFileError
from octavo.kv.extent import Extent
from octavo.kv.snapshot import DTYPES, Ragged, SnapshotLayout
from octavo.reuse.record import Entry

MAGIC, VERSION = b"OKVR\r\n\x1a\n", 1
HEAD = struct.Struct("<8sIIQQ32s32s")  # magic, version, bytes of JSON, of the file, where slots begin, two SHA-256
ALIGNED = 64
PARTS = ("kept", "marked", "newest")


class OtherFormatError(ReuseFileError):
    """A file that another version of Octavo wrote, to which it is left."""


def encoded(entry: Entry, extent: Extent) -> list[bytes | memoryview]:
    """The content of a record's file, in pieces."""
    slots: list[bytes | memoryview] = []
    digest, size = hashlib.sha256(), 0
    for t in _tensors(extent):
        data = memoryview(_array(t.contiguous().flatten()))
        for piece in (data, bytes(-len(data) % ALIGNED)):
            digest.update(piece)
            slots.append(piece)
            size += len(piece)
    layout = {**asdict(entry.layout), "dtype": str(entry.layout.dtype).removeprefix("torch.")}
    named = {
        "space": entry.space, "identity": entry.identity, "tenant": entry.tenant, "tags": entry.tags,
        "created": entry.created, "expires": None if entry.expires == float("inf") else entry.expires,
        "layout": layout, "first": entry.first, "last": entry.last, "held": entry.held, "newest": entry.newest,
        "sizes": dict(entry.sizes), "tokens": len(entry.tokens),
    }  # fmt: skip
    text = json.dumps(named, sort_keys=True).encode()
    body = text + bytes(-(HEAD.size + len(text)) % ALIGNED) + entry.tokens.astype("<i4").tobytes()
    body += bytes(-(HEAD.size + len(body)) % ALIGNED)
    begins = HEAD.size + len(body)
    fields = (MAGIC, VERSION, len(text), begins + size, begins)
    head = HEAD.pack(*fields, hashlib.sha256(HEAD.pack(*fields, b"", digest.digest()) + body).digest(), digest.digest())
    return [head, body, *slots]


def read_entry(path: Path) -> Entry:
    """A file's head. Raises ReuseFileError unless all of it is as it was written, and OSError."""
    with path.open("rb") as file:
        return entry_in(file, os.fstat(file.fileno()).st_size, path)


def read_extent(path: Path, entry: Entry) -> Extent:
    """A file's slots, checked in a memory of their own. Raises ReuseFileError unless they are those of the entry.

    They are read, not mapped: what is checked is then what is used, whatever happens to the file meanwhile, and a file
    that is cut short ends no process.
    """
    with path.open("rb") as file:
        return extent_in(file, os.fstat(file.fileno()).st_size, path, entry)


def entry_in(file: BinaryIO, size: int, path: Path | str) -> Entry:
    """The head at the beginning of what is `size` bytes in all; `path` is named in errors. As `read_entry`."""
    fields = _fields(file.read(HEAD.size), path)
    _, _, text_size, file_size, begins, digest, slots_digest = fields
    if size != file_size or not HEAD.size + text_size <= begins <= file_size:
        raise ReuseFileError(f"{path} is truncated or damaged: its size is not what its head says")
    body = file.read(begins - HEAD.size)
    if hashlib.sha256(HEAD.pack(*fields[:5], b"", slots_digest) + body).digest() != digest:
        raise ReuseFileError(f"{path} is damaged: the SHA-256 of its head does not match")
    try:
        entry = _entry(json.loads(body[:text_size]), body, text_size)
        expected = sum(_aligned(t) for _, _, t in _expected(entry))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ReuseFileError(f"{path} contradicts itself: {e}") from e
    if size - begins != expected:
        raise ReuseFileError(f"{path} contradicts itself: its size is not that of its slots")
    return entry


def extent_in(file: BinaryIO, size: int, path: Path | str, entry: Entry) -> Extent:
    """The slots in what is `size` bytes in all, from its beginning. As `read_extent`."""
    _, _, _, file_size, begins, _, digest = _fields(file.read(HEAD.size), path)
    expected = sum(_aligned(t) for _, _, t in _expected(entry))
    if file_size - begins != expected or size != file_size:
        raise ReuseFileError(f"{path} is truncated or damaged: its size is not what its head says")
    file.seek(begins)
    raw = torch.empty(expected, dtype=torch.uint8)
    if file.readinto(_array(raw)) != expected:  # type: ignore[attr-defined]
        raise ReuseFileError(f"{path} is truncated")
    if hashlib.sha256(_array(raw)).digest() != digest:
        raise ReuseFileError(f"{path} is damaged: the SHA-256 of its slots does not match")
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    at = 0
    for part, name, empty in _expected(entry):
        parts[part][name] = raw[at : at + empty.nbytes].view(empty.dtype).view(empty.shape)
        at += _aligned(empty)
    made = {part: Ragged(**tensors) for part, tensors in parts.items() if tensors}
    for part, slots in made.items():
        if bool((slots.counts < 0).any()) or int(slots.counts.sum()) != entry.sizes[part]:
            raise ReuseFileError(f"{path} contradicts itself: the counts of {part} are not those of its slots")
    return Extent(entry.layout, entry.first, entry.last, made["kept"], made["marked"], entry.held, made.get("newest"))


def slots_nbytes(entry: Entry) -> int:
    """Bytes of an entry's slots, without what aligns them."""
    return sum(t.nbytes for _, _, t in _expected(entry))


def head_nbytes(beginning: bytes) -> int:
    """How long the head is that begins so; 0 where that is no head of this format."""
    if len(beginning) < HEAD.size or beginning[: len(MAGIC)] != MAGIC:
        return 0
    return int(HEAD.unpack(beginning[: HEAD.size])[4])


def note(pinned: float, expires: float) -> bytes:
    """The note that says until when a record is pinned and when it expires, seconds since the epoch."""
    named = {
        name: None if math.isinf(value) and value > 0 else max(value, 0)
        for name, value in (("pinned", pinned), ("expires", expires))
    }
    text = json.dumps(named).encode()
    return hashlib.sha256(text).digest() + text


def read_note(data: bytes | None) -> tuple[float, float] | None:
    """(pinned, expires) of a note; None where it is none, or is damaged."""
    if data is None or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    try:
        named = json.loads(data[32:])
        pinned, expires = (math.inf if named[name] is None else float(named[name]) for name in ("pinned", "expires"))
    except (ValueError, KeyError, TypeError):
        return None
    return pinned, expires


def _fields(head: bytes, path: Path | str) -> tuple[Any, ...]:
    if len(head) < HEAD.size or head[: len(MAGIC)] != MAGIC:
        raise ReuseFileError(f"{path} is no file of a reuse cache, or its beginning is damaged")
    fields = HEAD.unpack(head)
    if fields[1] != VERSION:
        raise OtherFormatError(f"{path} is of format {fields[1]}, and this version of Octavo reads format {VERSION}")
    return fields


def _entry(named: Mapping[str, Any], body: bytes, text_size: int) -> Entry:
    at = text_size + (-(HEAD.size + text_size) % ALIGNED)
    tokens = np.frombuffer(body, "<i4", named["tokens"], at).astype(np.int32)
    layout = SnapshotLayout(**{**named["layout"], "dtype": DTYPES[named["layout"]["dtype"]]})
    expires = float("inf") if named["expires"] is None else float(named["expires"])
    held = tuple((int(a), int(b)) for a, b in named["held"])
    if not 0 <= named["first"] <= named["last"] == len(tokens) - layout.shift:
        raise ValueError("its positions are not those of its tokens")
    if not (isinstance(named["tenant"], str) and isinstance(named["space"], str) and math.isfinite(named["created"])):
        raise ValueError("its tenant, its namespace or the time of its making is none")
    return Entry(
        named["space"], named["identity"], named["tenant"], tuple(named["tags"]), float(named["created"]), expires,
        layout, tokens, named["first"], named["last"], held, bool(named["newest"]), named["sizes"],
    )  # fmt: skip


def _expected(entry: Entry) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, an empty tensor of its dtype and shape) of all tensors, in the order of the file."""
    for part in PARTS:
        if part not in entry.sizes:
            continue
        n = entry.sizes[part]
        for name, (dtype, shape) in entry.layout.shapes(n, tail=False).items():
            yield part, name, torch.empty(shape, dtype=dtype, device="meta")


def _tensors(extent: Extent) -> Iterator[Tensor]:
    for part in extent.parts.values():
        for name in extent.layout.shapes(0, tail=False):
            yield part.tensors[name]


def _array(t: Tensor) -> Any:
    """The bytes of a contiguous tensor, not copied."""
    return t.view(torch.uint8).numpy()


def _aligned(t: Tensor) -> int:
    return t.nbytes + -t.nbytes % ALIGNED
