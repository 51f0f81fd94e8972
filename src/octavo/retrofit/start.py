"""What training starts from: text that fits the model; fresh gates and SwiftKV weights, or those of adapters."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from octavo.adapter_file import check_fingerprint
from octavo.attachment.supported import fingerprint, shape_of
from octavo.config import Eviction
from octavo.dms import Adapter, Gates, GateSpec
from octavo.errors import ConfigError
from octavo.retrofit.data import Source
from octavo.retrofit.settings import RetrofitSettings, SwiftSettings
from octavo.swiftkv import SwiftKV, SwiftKVAdapter, SwiftSpec, initial, spec_for

Init = Sequence[Adapter | SwiftKVAdapter]


def check_sources(model: PreTrainedModel, sources: Sequence[Source], length: int) -> None:
    """Raise ConfigError unless there is text, of tokens that the model knows, and it has positions for `length`."""
    if not sources:
        raise ConfigError("training needs at least one source of text")
    check_length(model, length)
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[no-untyped-call, assignment]
    known = len(embedding)
    for source in sources:
        highest = int(source.tokens.max())
        if highest >= known:
            raise ConfigError(
                f"{source.name} holds token {highest}, but the model knows {known} tokens; "
                "use text tokenised with the model's own tokenizer"
            )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise ConfigError unless the model has positions for `length`."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(f"length {length} is past the model's {positions} positions; give {positions} at most")


def chosen(
    model: PreTrainedModel, settings: RetrofitSettings, init: Init
) -> tuple[Adapter | None, SwiftKVAdapter | None]:
    """(gates, SwiftKV adapter) of what was given.

    Raises AdapterMismatchError, UnsupportedModelError, and ConfigError for what this run does not train and for a shape
    of SwiftKV weights that the model or the adapter does not have.
    """
    for adapter in init:
        check_fingerprint(adapter, fingerprint(model))
    gates = [a for a in init if isinstance(a, Adapter)]
    transforms = [a for a in init if isinstance(a, SwiftKVAdapter)]
    for found, wanted, what in ((gates, settings.gates, "gates"), (transforms, settings.swiftkv, "SwiftKV weights")):
        if found and wanted is None:
            raise ConfigError(f"adapter {found[0].name} holds {what}, which this run does not train")
        if len(found) > 1:
            raise ConfigError(f"two adapters with {what} to start from, {found[0].name} and {found[1].name}; give one")
    found_gates, found_transform = (gates[0] if gates else None), (transforms[0] if transforms else None)
    if settings.swiftkv is not None:
        _check_shape(model, settings.swiftkv, found_transform)
    return found_gates, found_transform


def _check_shape(model: PreTrainedModel, s: SwiftSettings, init: SwiftKVAdapter | None) -> None:
    spec_for(model, s.kv_layers, s.group, s.before)
    if init is None:
        return
    given = init.transform.spec
    if (given.kv_layers, given.group, given.before) != (s.kv_layers, s.group, s.before):
        raise ConfigError(
            f"adapter {init.name} has K={given.kv_layers}, groups of {given.group} and before={given.before}; "
            f"this run trains K={s.kv_layers}, groups of {s.group} and before={s.before}"
        )


def made_with(
    model: PreTrainedModel, settings: RetrofitSettings, sources: Sequence[Source], init: dict[str, str | None]
) -> dict[str, Any]:
    """What a run must share with the one that it resumes, as JSON values; `init`: names of adapters."""
    data = {
        f"source {i}": {"name": source.name, "share": source.share, "tokens": len(source.tokens)}
        for i, source in enumerate(sources, 1)
    }
    dtype, told = str(model.dtype).removeprefix("torch."), asdict(settings)
    if told["swiftkv"] and not told["swiftkv"]["before"]:
        del told["swiftkv"]["before"]  # checkpoints of earlier versions do not say it
    return {"settings": told, "model": fingerprint(model), "init": init, "data": data, "dtype": dtype}


def first_transform(model: PreTrainedModel, settings: RetrofitSettings, init: SwiftKVAdapter | None) -> SwiftKV | None:
    """float32 weights on the model's device; None without SwiftKV. `init` is of the same shape (see `chosen`)."""
    s = settings.swiftkv
    if s is None:
        return None
    transform = initial(model, s.kv_layers, s.group, s.before)
    if init is not None:
        transform.load_state_dict(init.transform.state_dict())
    return transform.requires_grad_(s.lr > 0)


def first_gates(
    model: PreTrainedModel, settings: RetrofitSettings, spec: SwiftSpec | None, init: Adapter | None
) -> tuple[Gates | None, float]:
    """(gates on the model's device, one per KV layer; the compression that they start at), None where none are trained.

    Gates made for the base model may start gates on a transform (`spec`): the first K are taken, the others are fitted
    before the first step (`regression.fit_gates`). `init` may have another window: what a gate should keep depends on
    it little. Raises ConfigError where it has other settings otherwise.
    """
    s, shape = settings.gates, shape_of(model.config)
    if s is None:
        return None, 1.0
    cached = spec.cached_layers if spec else shape["num_hidden_layers"]
    eviction = Eviction(s.window, s.shift)
    gates = Gates(GateSpec(cached, shape["hidden_size"], shape["num_key_value_heads"], eviction)).to(model.device)
    if init is None:
        return gates, 1.0
    taken = cached
    if init.made_on is not None:
        made = (init.made_on["kv_layers"], init.made_on["group"], init.made_on.get("before", 0))
        if spec is None or made != (spec.kv_layers, spec.group, spec.before):
            raise ConfigError(
                f"gates {init.name} were made on SwiftKV with K={made[0]}, groups of {made[1]} and before={made[2]}"
            )
    elif spec is not None:
        taken = spec.kv_layers
    given, offset = init.gates.spec, gates.spec.offset
    if replace(given, layers=cached, eviction=replace(given.eviction, window=s.window), offset=offset) != gates.spec:
        raise ConfigError(f"adapter {init.name} has other gate settings: {given}")
    own = gates.state_dict()
    for name, tensor in init.gates.folded_state().items():
        own[name][:taken] = tensor[:taken].to(own[name])
    own["bias"][:taken] -= (given.offset - offset) / given.scale
    return gates, min(init.target, s.target)
