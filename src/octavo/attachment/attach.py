"""Joining adapters to a Hugging Face model, and undoing it: what users call; `octavo.attachment` is what it makes."""

from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedModel

from octavo.adapter_file import check_fingerprint
from octavo.attachment.adapters import Named, resolve
from octavo.attachment.attachment import Attachment, attachment_of, require_attachment
from octavo.attachment.borrowed import lends_channel
from octavo.attachment.chunks import default_chunk
from octavo.attachment.layout import Layout, joined, unwrapped
from octavo.attachment.modes import Modes
from octavo.attachment.reuse import Reuse
from octavo.attachment.settings import cache_settings, check_store
from octavo.attachment.supported import fingerprint, layout_of
from octavo.dms import Adapter
from octavo.dms.checkpoint import MODEL_TYPES
from octavo.errors import AdapterMismatchError, UnsupportedModelError
from octavo.swiftkv import SwiftKVAdapter, check_pair, spec_for

Model = TypeVar("Model", bound=PreTrainedModel)


def attach(
    model: Model,
    adapter: Named | Sequence[Named] | None = None,
    *,
    chunk: int | None = None,
    page_size: int = 16,
    budget: int | None = None,
    kv_dtype: str | None = None,
    cuda_graphs: bool = False,
    compile: bool = False,
    reuse: Reuse | None = None,
    undo: int | None = None,
) -> Model:
    """Make `model` keep its keys and values on Octavo's pages, and evict and skip as `adapter` says. Returns it.

    `adapter`: an Adapter (gates), a SwiftKVAdapter, a folder, a shipped name, a list of gates and SwiftKV, or
    None: same pages, nothing evicted, nothing skipped. `chunk`: tokens per prefill step, by default 512, on CUDA
    8,192. `budget`: bytes that the pages of all caches may take, reference counts included; page tables and what a
    prompt's chunk is before it goes into pages come on top. While caches hold a part of it the model cannot make new
    ones in another dtype or on another device. `kv_dtype`: "int8" or "fp8" stores keys and values as codes with one
    scale per slot, in about half of the bytes of bfloat16; None: in the model's dtype. `cuda_graphs`: on CUDA, steps of
    one token per sequence run from CUDA graphs, and prompts, when some of about their length have come, which spares
    the host nearly all work; the model's modules must not change then (see `octavo.attachment.graphs`). Models with
    windows run without. `compile`: these run with pieces of `torch.compile`, which takes a minute at first and rounds
    bfloat16 less often, and weights move into blocks of memory (see `octavo.attachment.compiled`).
    `reuse`: an `octavo.ReuseStore`; `generate` then computes of a prompt only what was not computed before, see
    `octavo.attachment.reuse`. `undo`: how many of its newest tokens a cache can always take back (`crop`), whatever has
    expired meanwhile; a marked token keeps its slot so many tokens longer. None: none, and 32 where `generate` is to
    draft tokens (an assistant, prompt lookup, early exit); drafts are cut to it.

    An attached model is detached first. Where a padded input comes without `position_ids`, positions count tokens, not
    columns as in transformers, so that a sequence's keys are the same however it was padded; `generate` passes them and
    answers as before.

    A model that reads more than text is attached at the language model inside it, a `PeftModel` at the model that its
    adapters are in; both go on being used whole. One forward of three tokens is run on the model before.

    Raises UnsupportedModelError, AdapterFileError, AdapterMismatchError or ConfigError; the model is then as
    it was.
    """
    inner = joined(model)
    before = attachment_of(model)
    if before is not None:
        before.undo()
    try:
        layout = layout_of(model)
        shape = Modes(inner, layout, None, None).shape(skips=False)
        chunk = default_chunk(shape.device) if chunk is None else chunk
        settings = cache_settings(shape, chunk, page_size, budget, kv_dtype, cuda_graphs, compile, undo)
        gates, swiftkv = _checked(inner, resolve(adapter))
        _check_layout(inner, layout, gates, swiftkv, reuse)
        if reuse is not None and inner is not unwrapped(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads more than text, which a ReuseStore cannot tell apart; attach it without"
            )
        Attachment(inner, layout, gates, swiftkv, settings, reuse).join()
    except BaseException:
        restore(model, before)
        raise
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model is exactly as it was before. Raises NotAttachedError when it was not attached."""
    require_attachment(model).undo()
    return model


def restore(model: PreTrainedModel, before: Attachment | None) -> None:
    """Leave the model as `attachment_of` found it earlier: unattached, or joined as before, so that caches live on."""
    now = attachment_of(model)
    if now is before:
        return
    if now is not None:
        now.undo()
    if before is not None:
        before.join()


def set_swiftkv(model: Model, on: bool) -> Model:
    """Switch SwiftKV on, or off: then the model is the exact base model, from the same weights. Returns the model.

    Gates that were distilled on SwiftKV rest while it is off. Caches that were filled before keep their mode and
    refuse the other. Raises NotAttachedError, and ConfigError where no SwiftKV adapter is attached.
    """
    require_attachment(model).switch(on)
    return model


def _check_layout(
    model: PreTrainedModel, layout: Layout, gates: Adapter | None, swiftkv: SwiftKVAdapter | None, reuse: Reuse | None
) -> None:
    """Raise UnsupportedModelError for what is asked of a model with windows, softcapping, sinks or states and is not
    made, ConfigError for what is no store."""
    check_store(reuse)
    name, scored, windowed = type(model).__name__, layout.scored, layout.windowed
    if gates is not None and swiftkv is None and gates.made_on is None:
        spec = gates.gates.spec
        if (spec.layers, spec.kv_heads) != (len(layout.stores), layout.kv_heads):
            raise AdapterMismatchError(
                f"the gates {gates.name} are of {spec.layers} layers of {spec.kv_heads} KV heads, and {name} keeps "
                f"keys of {len(layout.stores)} layers of {layout.kv_heads}"
            )
    if layout.runs_on is not None and (swiftkv is not None or reuse is not None):
        raise UnsupportedModelError(
            f"{name} is offloaded: its weights come to {layout.runs_on} only while they are used, with which SwiftKV "
            "and a ReuseStore are not supported; attach it without"
        )
    if layout.states and reuse is not None:
        raise UnsupportedModelError(
            f"{name} has layers with a state of their own, which a ReuseStore cannot keep; attach it without"
        )
    if swiftkv is not None and (windowed or scored):
        raise UnsupportedModelError(f"{name} has windows, softcapping or sinks, with which SwiftKV is not supported")
    if windowed and reuse is not None:
        raise UnsupportedModelError(f"{name} has windows, whose tokens a ReuseStore cannot keep; attach it without")
    if layout.heads and gates is not None and reuse is not None:
        raise UnsupportedModelError(
            f"{name} has layers of unequal heads, whose marked tokens a ReuseStore cannot keep; attach it without one, "
            "or without gates"
        )
    if (windowed or layout.heads) and gates is not None and gates.gates.spec.eviction.shift:
        raise UnsupportedModelError(
            f"{name} has windows or layers of unequal heads, with which gates whose marks are read one token later "
            "(shift 1) are not supported"
        )


def _checked(
    model: PreTrainedModel, adapters: list[Adapter | SwiftKVAdapter]
) -> tuple[Adapter | None, SwiftKVAdapter | None]:
    """(gates, SwiftKV) from a list of at most one of each; raises AdapterMismatchError unless they fit this model."""
    ours = fingerprint(model) if adapters else {}
    for each in adapters:
        check_fingerprint(each, ours)
    gates = next((a for a in adapters if isinstance(a, Adapter)), None)
    swiftkv = next((a for a in adapters if isinstance(a, SwiftKVAdapter)), None)
    if swiftkv is not None:
        spec = swiftkv.transform.spec
        if spec != spec_for(model, spec.kv_layers, spec.group, spec.before):
            raise AdapterMismatchError(f"adapter {swiftkv.name} has other shapes than this model: {spec}")
    _check_borrowed(model, gates, swiftkv)
    if gates is not None:
        check_pair(gates.name, gates.made_on, swiftkv)
    return gates, swiftkv


def _check_borrowed(model: PreTrainedModel, gates: Adapter | None, swiftkv: SwiftKVAdapter | None) -> None:
    """Raise unless what queries lend to gates and what gates borrow go together."""
    lends = lends_channel(model.config)
    if gates is not None and gates.gates.spec.borrowed and not lends:
        raise AdapterMismatchError(
            f"the gates {gates.name} read channels of the queries of the model that they were published with; "
            f"load that, as in octavo.load({gates.name!r})"
        )
    if lends and model.config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"queries that lend a channel to gates are read in {', '.join(MODEL_TYPES)} models, not in "
            f"{model.config.model_type} ones"
        )
    if lends and swiftkv is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}'s queries lend a channel to its gates, and SwiftKV replaces queries"
        )
