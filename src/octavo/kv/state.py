"""What a batch of sequences is between two operations: one value, replaced as a whole.

So an interrupt finds a batch as it was before an operation or as it is after it, and what the tables say beside that is
put right by whoever comes next: `PagePool.mend` for pages and rows, `State.back` for tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kv.capture import Boundaries
from octavo.kv.pool import pages_for

if TYPE_CHECKING:
    from octavo.kv.chunk_step import ChunkStep


@dataclass
class Back:
    """Rows must be taken back to `position` [B] int32 before anything else: a forward runs, or one was interrupted."""

    position: Tensor
    longest: int  # `State.longest` then
    chunk: "ChunkStep | None" = None  # knows what it has overwritten


class Promise(NamedTuple):
    """Pages that a captured step may take: each of `heads` rows of pages may grow to `slots` slots."""

    slots: int
    heads: int
    page_size: int
    copies: int  # pages that are shared now and may have to be copied
    generation: int  # of the tables whose addresses the step was captured with


@dataclass(frozen=True)
class State:
    """Which sequences a batch has, and what the host knows of them without asking the device.

    `rows`: their rows of the tables, in the batch's order. `seen`: columns read, padding included; `real` [B, seen]
    bool says which of them are no padding, None: all. `lead`: how many columns of padding at least each row begins
    with; `padded`: whether there may be other padding. `longest`: no row has more slots.

    A slot is free when its token has expired or was taken back. `cropped`: slots may be free inside rows for another
    reason than the window. `scattered`: slots may be free of which `Tables.marks` knows nothing, so that a step must
    search for them; without it the only free slot is that of the token that has just expired, which `marks` names. So
    it is after a step of several tokens, of which `marks` names the last that expired, and after tokens were taken
    back, until a search leaves none over. `shared`: other rows may name pages of these.

    `epoch` moves on where rows change or are taken back, `scatters` where slots scatter: an answer of the device to a
    question asked before means nothing then.
    """

    rows: tuple[int, ...] = ()
    seen: int = 0
    real: Tensor | None = None
    lead: tuple[int, ...] = ()
    padded: bool = False
    longest: int = 0
    cropped: bool = False
    scattered: bool = False
    shared: bool = False
    boundaries: Boundaries = field(default_factory=Boundaries)
    back: Back | None = None
    promise: Promise | None = None
    epoch: int = 0
    scatters: int = 0

    @property
    def asked(self) -> tuple[int, int]:
        """Of what moment a question about free slots is."""
        return self.epoch, self.scatters

    def columns_read(self, device: torch.device) -> Tensor:
        """Which columns seen are no padding, [B, seen] bool."""
        if self.real is not None:
            return self.real
        return torch.ones(len(self.rows), self.seen, dtype=torch.bool, device=device)


class Holding:
    """Where a batch keeps its state; it outlives the batch until its rows are given back."""

    def __init__(self) -> None:
        self.state = State()

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the tables that are in use."""
        return self.state.rows

    @property
    def nbytes(self) -> int:
        """Bytes held beside pages and rows."""
        real = self.state.real
        return (0 if real is None else real.nbytes) + self.state.boundaries.nbytes

    @property
    def promised(self) -> int:
        """Pages that a captured step may take."""
        promise, longest = self.state.promise, self.state.longest
        if promise is None or longest >= promise.slots:
            return 0
        return promise.heads * pages_for(promise.slots - longest, promise.page_size) + promise.copies


def joined(ours: State, theirs: State, device: torch.device) -> State:
    """The state of a batch that has taken over another's sequences behind its own."""
    seen, epoch = max(ours.seen, theirs.seen), ours.epoch + 1
    ahead = seen - ours.seen if ours.rows else 0, seen - theirs.seen
    boundaries = ours.boundaries.joined(theirs.boundaries, *ahead)
    if not (ours.rows and theirs.rows):
        return replace(ours if ours.rows else theirs, boundaries=boundaries, promise=None, epoch=epoch)
    real = None
    if ours.seen != theirs.seen or ours.real is not None or theirs.real is not None:
        real = torch.cat([F.pad(s.columns_read(device), (n, 0)) for s, n in zip((ours, theirs), ahead, strict=True)])
    return replace(
        ours,
        rows=ours.rows + theirs.rows,
        seen=seen,
        real=real,
        lead=tuple(n + ahead[0] for n in ours.lead) + tuple(n + ahead[1] for n in theirs.lead),
        padded=ours.padded or theirs.padded,
        longest=max(ours.longest, theirs.longest),
        cropped=ours.cropped or theirs.cropped,
        scattered=ours.scattered or theirs.scattered,
        shared=ours.shared or theirs.shared,
        boundaries=boundaries,
        promise=None,
        epoch=epoch,
    )


def selected(state: State, rows: Sequence[int], indices: Sequence[int]) -> State:
    """The state of a batch of which the sequences at `indices` are left, in `rows`."""
    epoch = state.epoch + 1
    if not rows:
        return State(boundaries=state.boundaries.forgotten(), epoch=epoch)
    lead = [state.lead[i] for i in indices]
    trimmed, real = min(lead), state.real
    if real is not None:
        needed = state.padded or max(lead) > trimmed
        real = real[torch.as_tensor(indices, device=real.device)][:, trimmed:] if needed else None
    followed = state.boundaries.followed([(row, state.rows[i]) for row, i in zip(rows, indices, strict=True)])
    return replace(
        state,
        rows=tuple(rows),
        seen=state.seen - trimmed,
        real=real,
        lead=tuple(n - trimmed for n in lead),
        shared=state.shared or len(rows) > len(set(indices)),
        boundaries=followed.moved(-trimmed),
        promise=None,
        epoch=epoch,
    )


def cropped(state: State, columns: int, now: Tensor) -> State:
    """The state of a batch whose newest columns go, as soon as its rows are taken back to position `now` [B] int32."""
    seen = state.seen - columns
    return replace(
        state,
        seen=seen,
        real=None if state.real is None else state.real[:, :-columns],
        lead=tuple(min(n, seen) for n in state.lead),
        cropped=True,
        boundaries=state.boundaries.cut(dict(zip(state.rows, now.tolist(), strict=True))),
        back=Back(now, state.longest),
        epoch=state.epoch + 1,
    )
