"""Which boundaries of a prompt are kept when it is computed, so that later prompts can go on from them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.kv.extent import Interval, joined
from octavo.kv.snapshot import SnapshotLayout

MOST = 16  # boundaries before a prompt's end: with windows of a few tokens more would cut it into too many forwards


@dataclass(frozen=True)
class Keeping:
    """What is kept of each prompt with eviction; without, every boundary can be gone on from.

    `back`: so many of the last tokens may differ in the next prompt, as a question after a document does. `every`: a
    boundary at each multiple of so many tokens, None: none; each costs about window * share of marked tokens. `turns`:
    where so many of a chat's turns end: the first one, often a system prompt, and the last ones.
    `shortest`: prompts of fewer tokens are neither looked up nor stored. Raises ConfigError.
    """

    back: int = 128
    every: int | None = None
    shortest: int = 64
    turns: int = 2

    def __post_init__(self) -> None:
        for name, value, least in (
            ("back", self.back, 0), ("every", self.every, 1), ("shortest", self.shortest, 1), ("turns", self.turns, 0)
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")

    def boundaries(
        self, layout: SnapshotLayout, length: int, learned: Iterable[int] = (), ends: Sequence[int] = ()
    ) -> tuple[int, ...]:
        """The boundaries of a prompt of `length` tokens; `learned` are those where prompts have parted before, `ends`
        those where turns end, which rise."""
        if layout.window is None:
            return (length,)
        step = max(1, min(layout.window - layout.shift, self.back))
        recent = range(length, max(0, length - self.back - step), -step)[: MOST + 1]
        chosen = {length, *(max(p, length - self.back) for p in recent), *learned}
        if self.turns:
            chosen.update([*ends[:1], *ends[max(1, len(ends) - self.turns + 1) :]])
        if self.every is not None:
            chosen.update(range(self.every, length, self.every))
        return tuple(sorted(p for p in chosen if 0 < p <= length))


def intervals(layout: SnapshotLayout, boundaries: Collection[int]) -> tuple[Interval, ...]:
    """The positions whose marked slots make these boundaries of a prompt, the last one its end, ones to go on from.

    With shift 1 all slots of the newest token are needed as well; at the end its mark is open, and they are there.
    """
    if layout.window is None:
        return ()
    end = max(boundaries, default=0) - layout.shift
    return joined([(max(0, p - layout.window), min(p, end)) for p in boundaries])
