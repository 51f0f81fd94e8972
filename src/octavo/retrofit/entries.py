"""What one line of an evaluation measures: gates, a SwiftKV transform, or gates on a transform."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from octavo.attachment.attach import attach
from octavo.dms import Adapter, Gates
from octavo.errors import ConfigError
from octavo.swiftkv import SwiftKV, SwiftKVAdapter

Entry = Adapter | SwiftKVAdapter | tuple[SwiftKVAdapter, Adapter]


@dataclass(frozen=True)
class Parts:
    """An entry's adapters as they are attached, and their weights where and how the model computes."""

    name: str
    adapters: list[SwiftKVAdapter | Adapter]
    transform: SwiftKV | None = None
    gates: Gates | None = None

    @property
    def skipped(self) -> float | None:
        """Share of the layers that a prompt token skips; None without SwiftKV."""
        return self.transform.spec.upper / self.transform.spec.layers if self.transform else None


DENSE = Parts("dense", [])


def parts_of(entry: Entry, model: PreTrainedModel) -> Parts:
    """The entry, its gates on the model's device, a copy of its transform there in the model's dtype."""
    adapters: list[SwiftKVAdapter | Adapter] = [*entry] if isinstance(entry, tuple) else [entry]
    transform, gates = None, None
    for adapter in adapters:
        if isinstance(adapter, SwiftKVAdapter):
            # A copy: rounding the adapter's own weights would spoil what is saved or trained further.
            transform = copy.deepcopy(adapter.transform).to(model.device, model.dtype)
        else:
            gates = adapter.gates.to(model.device)
    return Parts(" + ".join(a.name for a in adapters), adapters, transform, gates)


def attach_parts(model: PreTrainedModel, parts: Parts, **settings: Any) -> PreTrainedModel:
    """Attach the model with these adapters, or with none; `settings` go to `octavo.attach`. Raises as that does."""
    return attach(model, [*parts.adapters], **settings)


def together(adapters: Sequence[SwiftKVAdapter | Adapter]) -> Entry:
    """One entry from the adapters that are to be attached at once. Raises ConfigError for what has no meaning."""
    swiftkv = [a for a in adapters if isinstance(a, SwiftKVAdapter)]
    gates = [a for a in adapters if isinstance(a, Adapter)]
    if len(swiftkv) > 1 or len(gates) > 1 or not adapters:
        names = " + ".join(a.name for a in adapters) or "nothing"
        raise ConfigError(f"one SwiftKV transform, one set of gates or one of each go together, not {names}")
    return (swiftkv[0], gates[0]) if swiftkv and gates else adapters[0]


def named(entries: Sequence[tuple[str | None, Entry]]) -> dict[str, Entry]:
    """Entries by their labels, or where they have none by their own names; the second of one name is "name (2)"."""
    found: dict[str, Entry] = {}
    for label, entry in entries:
        own = " + ".join(a.name for a in (entry if isinstance(entry, tuple) else (entry,)))
        name, count = label or own, 1
        while (name if count == 1 else f"{name} ({count})") in found:
            count += 1
        found[name if count == 1 else f"{name} ({count})"] = entry
    return found


__all__ = ["DENSE", "Entry", "Parts", "attach_parts", "named", "parts_of", "together"]
