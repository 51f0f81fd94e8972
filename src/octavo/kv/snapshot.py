"""A sequence's keys and values at some token boundaries, apart from any pages: kept, written to a file, read again.

At boundary p (p tokens read) a query sees the slots that are kept for ever, and those of marked tokens of the last
window. The first are a matter of the tokens before p alone, so one segment between two boundaries serves every text
that goes through both. The second belong to p: each boundary has a tail of its own. docs/formats.md specifies the file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from octavo.attention import PageLayout
from octavo.config import NEVER
from octavo.errors import CacheStateError, OutputFileError, SnapshotFileError

KIND, FORMAT = "snapshot", 1
SETTINGS = "octavo"  # the one entry of the file's metadata: with several, their order would differ from file to file
STATE = "state."  # how the names of tensors begin that are states
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64", "int8", "float8_e4m3fn")}


class Ragged(NamedTuple):
    """Slots of all layers and heads, ordered by layer, head and position, as they are stored."""

    counts: Tensor  # [L, H] int32
    position: Tensor  # [n] int32, n the sum of `counts`
    key: Tensor  # [n, D] of the stored dtype
    value: Tensor  # [n, D]
    key_scale: Tensor | None = None  # [n] float32, where slots hold codes
    value_scale: Tensor | None = None
    expiry: Tensor | None = None  # [n] int32; None: never

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


@dataclass(frozen=True)
class SnapshotLayout:
    """What a cache must look like to hold a snapshot: `layers` are KV layers, `dtype` is how slots are stored.

    `window` and `shift` are those of `octavo.config.Eviction`; None and 0 where nothing is evicted. `window` is also
    None where layers have windows of their own, each token then having an expiry of its own.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None
    shift: int

    def expected(self, part: dict[str, Tensor], *, tail: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of each tensor of a segment or tail with the counts that `part` has."""
        return self.shapes(int(part["counts"].sum()), tail=tail)

    def shapes(self, n: int, *, tail: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of each tensor of n slots, by name; with an expiry each in a `tail`."""
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "counts": (torch.int32, (self.layers, self.kv_heads)),
            "position": (torch.int32, (n,)),
            "key": (self.dtype, (n, self.head_dim)),
            "value": (self.dtype, (n, self.head_dim)),
        }
        if PageLayout(1, self.head_dim, self.dtype).quantised:
            shapes |= dict.fromkeys(("key_scale", "value_scale"), (torch.float32, (n,)))
        if tail:
            shapes["expiry"] = torch.int32, (n,)
        return shapes


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One sequence at `boundaries` p_1 < p_2 < ..., each a number of tokens read; `KVCache.snapshot` makes it.

    `segments`: one per boundary, the slots kept for ever of the tokens whose fate was decided between the boundary
    before and this one: positions p_(i-1) - shift up to p_i - shift. `tails`: one per boundary, what a query at p_i
    sees beside: marked tokens with their expiry, and with shift 1 the newest token, whose mark is still open (its
    expiry is NEVER). So the state at p_i is the segments up to it and its tail, whatever was read later.

    `identity`: what the model was, JSON values by field. `tokens` int32 [n], n >= the last boundary, or None: the ids
    that were read, and those that are to be read next. `states`: what layers hold that have a state and no keys, by
    name, at the last boundary alone. `nbytes`: bytes of all tensors.
    """

    boundaries: tuple[int, ...]
    segments: tuple[Ragged, ...]
    tails: tuple[Ragged, ...]
    layout: SnapshotLayout
    identity: dict[str, Any]
    tokens: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)

    def at(self, boundary: int) -> list[Ragged]:
        """What makes up the state at a boundary; the last is its tail. Raises CacheStateError for another boundary."""
        if boundary not in self.boundaries:
            known = ", ".join(map(str, self.boundaries))
            raise CacheStateError(f"this snapshot has no boundary {boundary}; it has {known}")
        if self.states and boundary != self.boundaries[-1]:
            raise CacheStateError("this snapshot holds the states of its model's layers at its last boundary alone")
        which = self.boundaries.index(boundary)
        return [*self.segments[: which + 1], self.tails[which]]

    def counts(self, boundary: int) -> Tensor:
        """Slots that are seen at a boundary, int32 [L, H]."""
        return counted(self.at(boundary))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors().values())

    def to(self, device: torch.device | str) -> "Snapshot":
        """The same on another device."""
        moved = {name: t.to(device) for name, t in self._tensors().items()}
        return _assembled(self.boundaries, self.layout, self.identity, moved)

    def to_bytes(self) -> bytes:
        """The file's content; equal snapshots give equal bytes."""
        tensors = {name: t.cpu().contiguous() for name, t in self._tensors().items()}
        settings = {
            "kind": KIND,
            "format": FORMAT,
            "boundaries": self.boundaries,
            "layout": {**asdict(self.layout), "dtype": str(self.layout.dtype).removeprefix("torch.")},
            "identity": self.identity,
        }
        settings["sha256"] = _digest(settings, tensors)
        data: bytes = save_tensors(tensors, {SETTINGS: json.dumps(settings, sort_keys=True)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, source: str | Path = "these bytes") -> "Snapshot":
        """What `to_bytes` gave, on the CPU; errors name `source`. Raises SnapshotFileError unless it is whole."""
        settings = _settings(data, source)
        try:
            tensors = load_tensors(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as e:
            raise SnapshotFileError(f"snapshot {source} is truncated or damaged: {e}") from e
        if settings.get("sha256") != _digest(settings, tensors):
            raise SnapshotFileError(f"snapshot {source} is damaged or was altered: its SHA-256 does not match")
        try:
            boundaries = tuple(settings["boundaries"])
            layout = SnapshotLayout(**{**settings["layout"], "dtype": DTYPES[settings["layout"]["dtype"]]})
            _check(boundaries, layout, tensors)
            return _assembled(boundaries, layout, dict(settings["identity"]), tensors)
        except (KeyError, TypeError, ValueError) as e:
            raise SnapshotFileError(f"snapshot {source} is incomplete or contradicts itself: {e}") from e

    def save(self, path: str | Path) -> None:
        """Write a file, aside first and then renamed, so that there is never half of one. Raises OutputFileError."""
        path = Path(path)
        if not path.name or path.is_dir():
            raise OutputFileError(f"cannot write {str(path)!r}: it names a folder, not a file")
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as e:
            raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Read a file, onto the CPU. Raises SnapshotFileError unless it is a whole snapshot."""
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise SnapshotFileError(f"cannot read snapshot {path}: {e.strerror or e}") from e
        return cls.from_bytes(data, path)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in a file."""
        named = {} if self.tokens is None else {"tokens": self.tokens}
        named |= {f"{STATE}{name}": tensor for name, tensor in self.states.items()}
        for kind, parts in (("segment", self.segments), ("tail", self.tails)):
            for i, part in enumerate(parts):
                named |= {f"{kind}.{i}.{name}": tensor for name, tensor in part.tensors.items()}
        return named


class _Counted(Protocol):
    @property
    def counts(self) -> Tensor: ...


def counted(parts: Sequence[_Counted]) -> Tensor:
    """Slots of each layer and head in some parts together, int32 [L, H]."""
    return torch.stack([part.counts for part in parts]).sum(0, dtype=torch.int32)


def _assembled(
    boundaries: tuple[int, ...], layout: SnapshotLayout, identity: dict[str, Any], tensors: dict[str, Tensor]
) -> Snapshot:
    parts = _parts(tensors)
    segments, tails = (
        tuple(Ragged(**parts[f"{kind}.{i}"]) for i in range(len(boundaries))) for kind in ("segment", "tail")
    )
    states = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
    return Snapshot(boundaries, segments, tails, layout, identity, tensors.get("tokens"), states)


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each segment and tail, by its prefix and their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if prefix:
            parts.setdefault(prefix, {})[last] = tensor
    return parts


def _settings(data: bytes, source: str | Path) -> dict[str, Any]:
    """The JSON in the metadata of a safetensors file."""
    try:
        size = int.from_bytes(data[:8], "little")
        settings = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][SETTINGS])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SnapshotFileError(f"{source} is not a snapshot, or its beginning is damaged") from e
    if not isinstance(settings, dict) or settings.get("kind") != KIND or settings.get("format") != FORMAT:
        raise SnapshotFileError(f"{source} is not a snapshot of format {FORMAT}")
    return settings


def _check(boundaries: tuple[int, ...], layout: SnapshotLayout, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError or KeyError unless the tensors are those of such a snapshot, of the right shapes and values."""
    if not boundaries or any(type(p) is not int for p in boundaries) or boundaries[-1] >= NEVER:
        raise ValueError("boundaries must be whole numbers that fit into 32 bits, at least one")
    if any(a >= b for a, b in pairwise((0, *boundaries))):
        raise ValueError(f"boundaries {boundaries} do not rise from 1")
    expected, parts = {name for name in tensors if name == "tokens" or name.startswith(STATE)}, _parts(tensors)
    for prefix, tail in _prefixes(len(boundaries)):
        part = parts[prefix]
        if bool((part["counts"] < 0).any()):
            raise ValueError(f"{prefix}.counts has numbers below 0")
        for name, (dtype, shape) in layout.expected(part, tail=tail).items():
            if (part[name].dtype, part[name].shape) != (dtype, shape):
                raise ValueError(f"{prefix}.{name} must be {dtype} of shape {list(shape)}")
            expected.add(f"{prefix}.{name}")
        _check_slots(prefix, part, boundaries, layout)
    if set(tensors) != expected:
        raise ValueError(f"there are tensors that do not belong there: {', '.join(sorted(set(tensors) - expected))}")
    tokens = tensors.get("tokens")
    if tokens is not None and (tokens.dtype != torch.int32 or tokens.ndim != 1 or len(tokens) < boundaries[-1]):
        raise ValueError(f"tokens must be int32 of shape [n] with n at least {boundaries[-1]}")


def _check_slots(prefix: str, part: dict[str, Tensor], boundaries: tuple[int, ...], layout: SnapshotLayout) -> None:
    """Raise ValueError unless a segment or tail holds what a cache can have held at its boundary."""
    kind, _, which = prefix.partition(".")
    end, shift = boundaries[int(which)], layout.shift
    first = 0 if kind == "tail" or which == "0" else boundaries[int(which) - 1] - shift
    last = end if kind == "tail" else end - shift
    position, counts = part["position"].long(), part["counts"].flatten().long()
    head = torch.arange(len(counts)).repeat_interleave(counts)
    if bool(((position < first) | (position >= last)).any()):
        raise ValueError(f"{prefix} must have positions from {first} up to {last}")
    if bool((position.diff() <= 0)[head.diff() == 0].any()):
        raise ValueError(f"{prefix}.position must rise in every head")
    for name in ("key_scale", "value_scale"):
        if name in part and not bool(part[name].isfinite().all()):
            raise ValueError(f"{prefix}.{name} must be finite")
    if kind == "segment":
        return
    expiry, newest = part["expiry"].long(), position == end - 1
    marked = expiry < NEVER if shift == 0 else ~newest
    off = expiry != position + layout.window if layout.window is not None else expiry < position
    if bool((expiry < end).any()) or bool(off[marked].any()):
        raise ValueError(f"{prefix} must hold marked tokens that expire a window after their position, from {end} on")
    if bool((~marked & ((expiry != NEVER) | (shift == 0))).any()) or (shift and int(newest.sum()) != len(counts)):
        raise ValueError(f"{prefix} must hold the newest token of every head where its mark is open, and no other")


def _prefixes(count: int) -> Iterator[tuple[str, bool]]:
    for i in range(count):
        yield f"segment.{i}", False
        yield f"tail.{i}", True


def _digest(settings: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 over the settings, `sha256` aside, and over all tensors in the order of their names."""
    named = {k: v for k, v in settings.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
