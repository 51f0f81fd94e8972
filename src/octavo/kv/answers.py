"""What a batch asks the device about itself at the end of a step, and learns when a later one begins."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.kv.late import Late
from octavo.kv.plan import named_elsewhere
from octavo.kv.state import State
from octavo.kv.tables import Index, Tables

OFTEN = 16  # columns after which a batch that shares pages asks whether it still does


class Answers:
    """Answers to three questions: the most slots of any row, free slots that are left over, and shared pages.

    Each question remembers of which state it was, so one about rows that have changed since is ignored.
    """

    def __init__(self, device: torch.device) -> None:
        self._longest, self._left, self._shared = (Late(device) for _ in range(3))

    def ask(self, tables: Tables, index: Index, state: State, seen: int, left: Tensor | None) -> None:
        """Ask about rows `index` after a step from `state` on to `seen` columns; `left` is as a step gives it."""
        self._longest.post(tables.length[index].amax(), (seen, state.epoch))
        if left is not None:
            self._left.post(left, state.asked)
        if state.shared and seen // OFTEN > state.seen // OFTEN:
            self._shared.post(named_elsewhere(tables.pool, tables.table[index]).any(), state.epoch)

    def known(self, state: State) -> State:
        """The state with what has been answered meanwhile."""
        known: dict[str, Any] = {"longest": state.longest}
        for slots, (seen, epoch) in self._longest.poll():
            if epoch == state.epoch:
                known["longest"] = min(known["longest"], slots + state.seen - seen)
        for left, asked in self._left.poll():
            if asked == state.asked:
                known["scattered"] = left > 0
        for shared, epoch in self._shared.poll():
            if epoch == state.epoch:
                known["shared"] = shared > 0
        return replace(state, **known)
