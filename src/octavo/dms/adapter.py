"""DMS adapters: gates for one model and their files (`octavo.adapter_file`; docs/formats.md specifies them)."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from octavo.adapter_file import read_adapter, write_adapter
from octavo.config import Eviction
from octavo.dms.gate import Gates, GateSpec
from octavo.errors import AdapterFileError, ConfigError

KIND = "dms"
MOST = 1e6  # logits by which gates may be moved; they keep everything long before
FORMAT, WITH_SWIFTKV = 1, 2  # gates distilled on a SwiftKV transform must not be taken for the base model's


@dataclass(frozen=True)
class Adapter:
    """Gates for one model.

    `fingerprint` names the model (see `attachment.supported.fingerprint`); `target` is the compression trained for;
    `card` holds the training settings and the measured results, JSON values only. `made_on` is the fingerprint
    of the SwiftKV transform that the gates were distilled on (`SwiftKV.fingerprint`), None for the base model. On a
    transform there is one gate per KV layer, and those from layer K on read what keys and values come from.
    """

    name: str
    gates: Gates
    fingerprint: dict[str, Any]
    target: float
    card: dict[str, Any] = field(default_factory=dict)
    made_on: dict[str, Any] | None = None

    def keeping_more(self, logits: float) -> "Adapter":
        """The same gates, all of whose logits are lower by so much: more tokens are kept, and less is lost.

        Bytes for quality without training: `octavo.load_adapter("dms-8x").keeping_more(10)` is dms-5x, and
        docs/experiments.md has more such points. Raises ConfigError for a number that is not positive: gates that are
        pushed the other way soon forget the first tokens, on which attention rests, and with them everything.
        """
        if not isinstance(logits, int | float) or not 0 < logits <= MOST:
            raise ConfigError(
                f"gates can keep more by a positive number of logits, at most {MOST:g}, not by {logits!r}"
            )
        gates = copy.deepcopy(self.gates)
        gates.spec = replace(gates.spec, offset=gates.spec.offset + logits)
        measured = {"suite", "evaluation", "search"}  # of the gates that these are made of
        card = {key: value for key, value in self.card.items() if key not in measured}
        card["init"] = f"{self.name}, whose logits are lower by {logits:g} here; no training beside"
        return replace(self, name=f"{self.name} keeping {logits:g} more", gates=gates, card=card)


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write the adapter into `folder` (made when missing). Written aside and renamed, so never half there.

    Raises OutputFileError, and ConfigError for gates that have no weights beside their model's.
    """
    spec = adapter.gates.spec
    if spec.borrowed:
        raise ConfigError(
            f"the gates {adapter.name} read channels of their model's queries and are no adapter for others; write "
            "model and gates as one checkpoint (octavo.save_published, octavo export)"
        )
    state = adapter.gates.folded_state()
    settings: dict[str, Any] = {
        "format": FORMAT if adapter.made_on is None else WITH_SWIFTKV,
        "kind": KIND,
        "name": adapter.name,
        "model": adapter.fingerprint,
        "window": spec.eviction.window,
        "shift": spec.eviction.shift,
        "scale": spec.scale,
        "offset": spec.offset,
        "granularity": spec.granularity,
        "target": adapter.target,
        "card": adapter.card,
    }
    if adapter.made_on is not None:
        settings["swiftkv"] = adapter.made_on
        settings["stores"] = spec.layers  # the file's name for KV layers
    write_adapter(folder, settings, {name: state[name] for name in ("weight", "bias")})


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter. Raises AdapterFileError, saying what is wrong, for anything but a whole, valid one."""
    settings, tensors = read_adapter(folder, KIND, (FORMAT, WITH_SWIFTKV))
    try:
        gates = _gates(settings, tensors)
        made_on = settings["swiftkv"] if settings["format"] == WITH_SWIFTKV else None
        return Adapter(settings["name"], gates, settings["model"], settings["target"], settings["card"], made_on)
    except (KeyError, TypeError, ConfigError) as e:
        raise AdapterFileError(f"adapter {folder} is incomplete: {e}") from e


def _gates(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Gates:
    model = settings["model"]
    spec = GateSpec(
        layers=settings["stores"] if settings["format"] == WITH_SWIFTKV else model["num_hidden_layers"],
        hidden=model["hidden_size"],
        kv_heads=model["num_key_value_heads"],
        eviction=Eviction(settings["window"], settings["shift"]),
        scale=settings["scale"],
        offset=settings["offset"],
        granularity=settings["granularity"],
    )
    gates = Gates(spec)
    for name, parameter in gates.named_parameters():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
            raise ConfigError(f"{name} must be finite with shape {tuple(parameter.shape)}, not {tuple(tensor.shape)}")
        parameter.data = tensor.float()
    return gates
