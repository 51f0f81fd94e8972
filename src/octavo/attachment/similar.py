"""A prompt out of similar ones: keys turned to their new positions, and one forward over what is missing.

RoPE turns a key by its position, K_i = R(i) k, so K_i = R(i - j) K_j. Where that is not so (frequencies that depend on
the length, positions of several axes), where slots hold codes of few bits, which would be rounded a second time, or
where tokens hand something to the one after them, which need not follow them here, nothing is put together. Sequences
so made are approximate; see `octavo.reuse.similar` for what is lost.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attachment.blend import deviating, without
from octavo.attachment.cache import KVCache
from octavo.attachment.compiled import ROTARY
from octavo.kv.ragged import between
from octavo.kv.restoring import layout_of
from octavo.kv.scattered import begin_between, complete
from octavo.kv.snapshot import Ragged

if TYPE_CHECKING:
    from octavo.attachment.attachment import Attachment

TOLERANCE = 1e-3  # of turned keys, relative: angles of far positions are rounded in float32
PROBED = 61, 1000  # positions between which a probe is turned


def begin_similar(store: Any, cache: KVCache, tokens: Sequence[int]) -> Any:
    """Fill an empty cache with a prompt but its last token from similar ones; None: the store has nothing that helps.

    Raises CacheBudgetError; the cache is empty then.
    """
    similar, attachment = getattr(store, "similar", None), cache.attachment
    if similar is None or attachment.needs_whole or not turns(attachment):
        return None
    identity, layout = cache.identity(), layout_of(cache.tables, cache.sequences.shift)
    draft = similar.draft(identity, layout, tokens, lambda ids: mean_embedding(attachment, ids))
    taken = None if draft is None else similar.take(draft)
    if draft is None or taken is None:
        return None
    computed = draft.computed.tolist()
    if similar.settings.deviating and layout.window is None:
        more = deviating(attachment, draft.tokens[:-1], taken, similar.settings.deviating)
        taken, computed = without(taken, more), sorted([*computed, *more])
    if not taken:
        return None
    try:
        fill_between(attachment, cache, draft.tokens, taken, computed)
        if similar.due():
            similar.audited(audit(attachment, cache, tokens))
    except BaseException:
        cache.abandon()
        cache.reset()
        raise
    cache.approximate = True
    similar.count(len(tokens), len(tokens) - 1 - len(computed))
    return similar.reading(identity, len(tokens) - 1)


def mean_embedding(attachment: "Attachment", ids: Sequence[int]) -> list[float]:
    """The mean of the model's input embeddings of some tokens."""
    weight: Tensor = attachment.model.get_input_embeddings().weight  # type: ignore[assignment]
    with torch.no_grad():
        found = F.embedding(torch.tensor(ids, device=weight.device), weight).float().mean(0)
    return [float(x) for x in found.tolist()]


@torch.no_grad()
def fill_between(attachment: "Attachment", cache: KVCache, tokens: Any, taken: Sequence[Any], computed: Any) -> None:
    """Fill an empty cache with all tokens but the last: slots that are `taken`, and those at the positions `computed`
    (rising), which run through the model in chunks. They see what stands before them, wherever it comes from."""
    layout = layout_of(cache.tables, cache.sequences.shift)
    parts = [part for piece in taken for part in _moved(attachment, piece)]
    limit = len(tokens) - 1
    cache.sequences.restore(layout, parts, limit - len(computed))
    device, chunk = attachment.model.device, attachment.settings.chunk
    position = torch.as_tensor(computed, dtype=torch.int32)
    ids = torch.as_tensor(tokens, dtype=torch.int64)[position.long()].to(device)
    for first in range(0, len(position), chunk):
        part = position[first : first + chunk]
        after = int(position[first + chunk]) if first + chunk < len(position) else limit
        begin_between(cache, part, after)
        forward = attachment.forward_on(cache, keep=0)
        attachment.original(
            input_ids=ids[None, first : first + chunk],
            position_ids=part[None].long().to(device),
            past_key_values=cache,
            use_cache=True,
            octavo_forward=forward,
        )
        forward.commit()
    complete(cache.sequences)


def _moved(attachment: "Attachment", piece: Any) -> list[Ragged]:
    """An extent's slots as they are at their new positions."""
    extent, out = piece.extent, [between(piece.extent.kept, piece.first, piece.last)]
    if piece.marked:
        out.append(between(extent.marked, piece.first, piece.last))
    out = [turned(attachment, part, piece.by) for part in out]
    if piece.marked:
        out[1] = out[1]._replace(expiry=out[1].position + extent.layout.window)
    return out


def turned(attachment: "Attachment", part: Ragged, by: int) -> Ragged:
    """Slots as if their tokens stood `by` positions further on: keys are turned in float32, values stay."""
    if by == 0:
        return part
    wide = torch.float64 if part.key.dtype == torch.float64 else torch.float32
    key = turn(attachment, part.key.to(wide), by)
    return part._replace(key=key.to(part.key.dtype), position=part.position + by)


def turn(attachment: "Attachment", key: Tensor, by: int) -> Tensor:
    """Keys [n, D] turned by so many positions, as the model itself turns them, without its scale."""
    rotary: Any = attachment.model.base_model.rotary_emb
    position = torch.tensor([[by]], device=attachment.model.device)
    cos, sin = (t.to(key) for t in rotary(torch.zeros(1, 1, 1, dtype=key.dtype, device=position.device), position))
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    moved: Tensor = rotated(attachment)(key[None, None], key[None, None], cos / scale, sin / scale)[1][0, 0]
    return moved


def rotated(attachment: "Attachment") -> Any:
    """The function by which the model turns queries and keys."""
    return type(attachment.layout.attention[0]).forward.__globals__[ROTARY]  # type: ignore[attr-defined]


@torch.no_grad()
def turns(attachment: "Attachment") -> bool:
    """Whether turning a key moves it, to rounding: tried with the model's own rotary embedding."""
    known = attachment.__dict__.get("_turns")
    if known is None:
        try:
            known = _probe(attachment)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError):
            known = False
        attachment.__dict__["_turns"] = known
    return bool(known)


def _probe(attachment: "Attachment") -> bool:
    rotary: Any = attachment.model.base_model.rotary_emb
    device = attachment.model.device
    key = torch.randn(
        1, 1, 1, KVCache(attachment.model).shape.head_dim, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    first, last = (
        rotated(attachment)(key, key, *(t.float().cpu() for t in rotary(torch.zeros(1, 1, 1, device=device), at)))[1]
        for at in (torch.tensor([[p]], device=device) for p in PROBED)
    )
    moved = turn(attachment, first[0, 0], PROBED[1] - PROBED[0])
    back = turn(attachment, last[0, 0], PROBED[0] - PROBED[1])
    return all(bool(((a - b[0, 0]).norm() <= TOLERANCE * b.norm()).all()) for a, b in ((moved, last), (back, first)))


@torch.no_grad()
def audit(attachment: "Attachment", cache: KVCache, tokens: Sequence[int]) -> float:
    """KL in nats of the token after a prompt: the prompt computed in full against a cache that holds it but its last
    token, which stays as it is."""
    model: Any = attachment.model
    ids = torch.tensor([list(map(int, tokens))], device=model.device)
    ours = model(ids[:, -1:], past_key_values=copy.deepcopy(cache), logits_to_keep=1).logits[0, -1]
    full = KVCache(model, swiftkv=cache.swiftkv_on if attachment.swiftkv is not None else None)
    truth = model(ids, past_key_values=full, logits_to_keep=1).logits[0, -1]
    return divergence(truth, ours)


def divergence(truth: Tensor, ours: Tensor) -> float:
    """KL(truth || ours) in nats of two rows of logits [V]."""
    a, b = (F.log_softmax(t.double(), -1) for t in (truth, ours))
    return float((a.exp() * (a - b)).sum().clamp(min=0))
