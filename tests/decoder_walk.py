"""The walk over every decoder class: attached and without an adapter, is it what it is unattached?"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from octavo import KVCache, attach, detach
from octavo.errors import UnsupportedModelError
from tiny import tiny_adapter, tokens
from tiny_decoders import tiny_decoder

LENGTH, PROMPT, NEW, CLOSE = 45, 38, 12, 1e-4


class Outcome(NamedTuple):
    """What became of one class: "exact", "refused" (at `attach`), "no model" (none this small), or what must not be:
    "wrong", "crashes", "late" (refused only when it runs)."""

    status: str
    why: str = ""


class Answer(NamedTuple):
    logits: Tensor
    sequences: Tensor
    steps: Tensor


def padded(batch: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of prompts longer than every window; in a batch the first is shorter and padded on the left."""
    ids, mask = tokens(batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.int64)
    if batch > 1:
        ids[0, :19], mask[0, :19] = 0, 0
    return ids, mask


def answer(model: PreTrainedModel, batch: int) -> Answer:
    """The logits of a prompt, and what is generated after it."""
    ids, mask = padded(batch)
    given = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, **given).logits
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, output_logits=True,
            return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return Answer(logits[mask.bool()], out.sequences, torch.stack(out.logits))


def compared(model: PreTrainedModel, chunks: tuple[int, ...] = (16, 512), batches: tuple[int, ...] = (1, 2)) -> Outcome:
    """Attach a model that has not been attached and compare."""
    expected = {batch: answer(model, batch) for batch in batches}
    worst = 0.0
    for chunk in chunks:
        try:
            attach(model, chunk=chunk)
        except UnsupportedModelError as e:
            return Outcome("refused", str(e))
        except Exception as e:
            return Outcome("crashes", f"attach: {type(e).__name__}: {e}")
        for batch in batches:
            try:
                got = answer(model, batch)
            except UnsupportedModelError as e:
                return Outcome("late", str(e))
            except Exception as e:
                return Outcome("crashes", f"{type(e).__name__}: {e}")
            where = f"batch {batch}, chunk {chunk}"
            off = float((got.logits - expected[batch].logits).abs().max())
            worst = max(worst, off)
            if not off <= CLOSE:
                return Outcome("wrong", f"{where}: logits off by {off:.1e}")
            if not torch.equal(got.sequences, expected[batch].sequences):
                return Outcome("wrong", f"{where}: other tokens")
            off = float((got.steps - expected[batch].steps).abs().max())
            worst = max(worst, off)
            if not off <= CLOSE:
                return Outcome("wrong", f"{where}: logits of steps off by {off:.1e}")
        detach(model)
    return Outcome("exact", f"{worst:.0e}")


def evicted(model: PreTrainedModel) -> float:
    """How far logits of a model with random gates are off in pages, where they evict, from those under the hard mask.

    In chunks with left padding, then token by token.
    """
    ids, mask = padded(2)
    given = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    attach(model, tiny_adapter(model, window=6), chunk=16)
    with torch.no_grad():
        expected = model(input_ids=ids, **given, use_cache=False).logits
        cache, parts = KVCache(model), []
        for first, last in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))):
            part = {name: value[:, first:last] for name, value in given.items()}
            part["attention_mask"] = mask[:, :last]
            parts.append(model(input_ids=ids[:, first:last], **part, past_key_values=cache).logits)
    assert cache.kept.amin() < LENGTH - 19, "nothing was evicted"
    detach(model)
    return float((torch.cat(parts, 1) - expected)[mask.bool()].abs().max())


def outcome(kind: str, **how: tuple[int, ...]) -> Outcome:
    """Of the class of a model type."""
    try:
        model = tiny_decoder(kind)
    except Exception as e:
        return Outcome("no model", f"{type(e).__name__}: {e}")
    try:
        return compared(model, **how)
    except Exception as e:  # the unattached model itself
        return Outcome("no model", f"unattached: {type(e).__name__}: {e}")
