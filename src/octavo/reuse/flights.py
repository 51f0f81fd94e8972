"""Prompts that are being computed: a second request for one of them waits for it, so that it is computed once."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.kv.extent import Interval
from octavo.kv.snapshot import SnapshotLayout
from octavo.reuse.record import Tokens
from octavo.reuse.tree import common


@dataclass(eq=False)
class Flight:
    """A prompt that a thread computes now; `wanted`: positions whose marked slots will be kept."""

    space: str
    tokens: Tokens
    wanted: Sequence[Interval]
    thread: int = field(default_factory=threading.get_ident)
    landed: threading.Event = field(default_factory=threading.Event)

    def offers(self, tokens: Tokens, layout: SnapshotLayout, limit: int) -> int:
        """Up to which boundary another prompt will be able to go on from this one, 0 for none."""
        p = min(common(self.tokens, tokens), limit)
        if layout.window is None:
            return p
        best = 0
        for low, high in self.wanted:
            at = min(p, high)
            if at > best and low <= max(0, at - layout.window):
                best = at
        return best


class Flights:
    """All prompts that are being computed."""

    def __init__(self) -> None:
        self.all: list[Flight] = []
        self._lock = threading.Lock()

    def worth_waiting(
        self, space: str, tokens: Tokens, layout: SnapshotLayout, held: int, gain: int, limit: int
    ) -> Flight | None:
        """The flight of another thread that will save most, at least `gain` tokens more than are `held` already."""
        here, best, most = threading.get_ident(), None, held + gain - 1
        for flight in self.all:
            if flight.space == space and flight.thread != here:
                offered = flight.offers(tokens, layout, limit)
                if offered > most:
                    best, most = flight, offered
        return best

    def add(self, flight: Flight) -> None:
        """A prompt begins to be computed. Within the lock: `land` puts another list in the place of this one."""
        with self._lock:
            self.all.append(flight)

    def land(self, flight: Flight) -> None:
        """A prompt is stored, or will not be: those who wait for it look again."""
        with self._lock:
            self.all = [each for each in self.all if each is not flight]
        flight.landed.set()

    def land_elsewhere(self) -> None:
        """Let nobody wait for threads that are not in this process, after a fork."""
        self._lock = threading.Lock()
        for flight in [each for each in self.all if each.thread != threading.get_ident()]:
            self.land(flight)
