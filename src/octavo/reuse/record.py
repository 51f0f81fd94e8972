"""One stored stretch of a prompt: which tokens it belongs to, what it holds, who asked for it, how it is used."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.errors import InputError
from octavo.kv.extent import Extent, Interval
from octavo.kv.snapshot import SnapshotLayout

Tokens = NDArray[np.int32]
OVERHEAD = 4096  # bytes that a record's objects and its nodes of the tree take in Python, as the tests measure
FORMAT = 1  # of what a namespace's name is made of


@dataclass(frozen=True)
class Space:
    """A namespace: only requests that are equal in all of this share keys and values.

    `identity`: what the model is (`octavo.attachment.identity`), JSON values by field. `tenant`: whose requests.
    """

    identity: Mapping[str, Any]
    tenant: str = ""

    @property
    def name(self) -> str:
        """Hex SHA-256 over the fields, the same in every process."""
        fields = {"format": FORMAT, "identity": dict(self.identity), "tenant": self.tenant}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """What of a record never changes, without its slots.

    `space`: its namespace's name. `tokens`: all ids from the first one to the record's end, though it holds slots for
    positions `first` up to, not including, `last` alone; marked ones for the intervals `held`. `newest`: whether it has
    the newest token's open slots (shift 1). `sizes`: slots by part. `expires`: seconds since the epoch.
    """

    space: str
    identity: Mapping[str, Any]
    tenant: str
    tags: tuple[str, ...]
    created: float
    expires: float
    layout: SnapshotLayout
    tokens: Tokens
    first: int
    last: int
    held: tuple[Interval, ...]
    newest: bool
    sizes: Mapping[str, int]

    @property
    def key(self) -> str:
        """32 hex digits that tell records of different content apart."""
        digest = hashlib.sha256(f"{self.space} {self.first} {self.last} {self.held} {self.newest}".encode())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()[:32]

    def cut(self, extent: Extent) -> "Entry":
        """The entry of an extent that was cut."""
        tokens = self.tokens[: extent.last + extent.layout.shift]
        sizes = {name: len(part.position) for name, part in extent.parts.items()}
        return replace(
            self, tokens=tokens, last=extent.last, held=extent.held, newest=extent.newest is not None, sizes=sizes
        )


@dataclass(eq=False)
class Record:
    """An entry, where its slots are (memory, a file, a server), and how it is used.

    `remote_nbytes`: bytes of its value on the server, 0 where it has none as far as is known. `order` rises whenever it
    is used; `users` are requests that go on from it now. `pinned`: until when it must stay. `parents` hold the slots
    before its own; `children` are those whose parent it is.
    """

    entry: Entry
    nbytes: int  # of the slots
    extent: Extent | None = None
    path: Path | None = None
    file_nbytes: int = 0
    remote_nbytes: int = 0
    order: int = 0
    users: int = 0
    pinned: float = -math.inf
    expires: float = math.inf
    beside: int = 0  # bytes of its embedding
    gone: bool = False  # it was deleted, and a file that is still being written must not stay
    parents: set["Record"] = field(default_factory=set)
    children: set["Record"] = field(default_factory=set)
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.entry.key
        self.expires = self.entry.expires

    @property
    def ends(self) -> float:
        """Until when it may be gone on from: what is pinned does not expire."""
        return max(self.expires, self.pinned)

    @property
    def behind(self) -> bool:
        """Whether its slots are anywhere but in memory."""
        return self.path is not None or self.remote_nbytes > 0

    @property
    def noted(self) -> bool:
        """Whether it is pinned or lives otherwise than its entry says, which a note tells others."""
        return self.pinned > 0 or self.expires != self.entry.expires

    @property
    def index_nbytes(self) -> int:
        """Bytes of memory that it takes without its slots."""
        return int(self.entry.tokens.nbytes) + OVERHEAD + self.beside


def token_array(prompt: Any) -> Tokens:
    """Token ids of one prompt: a list, an array, a tensor, [1, n] too, or what a tokenizer returns.

    Raises InputError for anything else.
    """
    if isinstance(prompt, str):
        raise InputError("a prompt is given as token ids here; tokenize the text first")
    ids = prompt["input_ids"] if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids") else prompt
    try:
        found = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    except (TypeError, ValueError) as e:
        raise InputError(f"a prompt must be token ids, not {type(prompt).__name__}") from e
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(f"a prompt must be one row of whole numbers, not {found.dtype} of shape {list(found.shape)}")
    return np.ascontiguousarray(found, dtype=np.int32)
