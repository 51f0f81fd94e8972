"""Prompts that similar ones help with: what is computed of them, and how far their answers are off.

Each prompt is put together from the one that was read before it, and computed in full beside it. Both go on with the
same tokens, those that the full one finds most likely, and the distributions of every next token are compared.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

import octavo
from octavo.attachment.similar import begin_similar, divergence
from octavo.bench.reuse.measure import timed, with_store
from octavo.bench.reuse.traces import Cuts

EDIT = 8  # tokens
FIRST = "You are a careful assistant. Read the following text, then answer the question in one sentence.\n\n"
SECOND = "The reader has little time: be brief, name the people who occur in what follows, and never invent any.\n\n"
QUESTION = "\n\nQuestion: What happens in this text, and to whom? Answer:"


@dataclass(frozen=True)
class Alike:
    """One kind of change. `computed`: share of the prompt's tokens; `kl`: mean over the tokens of the answer, nats;
    `first_kl` of its first; `top1`: how often the most likely token is the same. Seconds are of the prompt."""

    change: str
    tokens: int
    used: bool
    computed: float
    kl: float
    first_kl: float
    top1: float
    similar_s: float
    full_s: float


def alike(
    model: PreTrainedModel, tokenizer: Any, cuts: Cuts, document: int, rounds: int, answer: int = 32
) -> list[Alike]:
    """All kinds of change, each a mean over `rounds` documents."""
    before = model.__dict__["_octavo"].reuse
    first, second, question = (tokenizer(text, verbose=False)["input_ids"] for text in (FIRST, SECOND, QUESTION))
    found: dict[str, list[Alike]] = {}
    try:
        for _ in range(rounds):
            text, middle = cuts.piece(document), document // 2
            edited = text[:middle] + cuts.piece(EDIT) + text[middle + EDIT - 2 :]
            for change, prompt in (
                ("instruction", second + text),
                ("edit in the middle", first + edited),
                ("documents swapped", first + text[middle:] + text[:middle]),
            ):
                made = _compared(model, change, first + text + question, prompt + question, answer)
                found.setdefault(change, []).append(made)
    finally:
        with_store(model, before)
    return [_mean(each) for each in found.values()]


@torch.no_grad()
def _compared(model: PreTrainedModel, change: str, before: list[int], prompt: list[int], answer: int) -> Alike:
    settings = octavo.SimilarSettings(audit=0.0)
    store = octavo.ReuseStore("4GiB", every=512, similar=settings)
    with_store(model, store)
    timed(model, before)
    run: Any = model
    ids = torch.tensor([prompt], device=model.device)
    ours, full = octavo.KVCache(model), octavo.KVCache(model)
    began = time.perf_counter()
    used = begin_similar(store, ours, prompt) is not None
    similar_s = time.perf_counter() - began
    began = time.perf_counter()
    run.base_model(input_ids=ids[:, :-1], past_key_values=full, octavo_keep=0)
    full_s = time.perf_counter() - began
    if not used:
        return Alike(change, len(prompt), False, 1.0, 0.0, 0.0, 1.0, similar_s, full_s)
    token, kl, same = ids[:, -1:], [], 0
    for _ in range(answer):
        truth, found = (run(token, past_key_values=cache).logits[0, -1] for cache in (full, ours))
        kl.append(divergence(truth, found))
        same += int(truth.argmax() == found.argmax())
        token = truth.argmax().view(1, 1)
    share = 1 - store.stats().similar_tokens / len(prompt)
    return Alike(change, len(prompt), True, share, sum(kl) / answer, kl[0], same / answer, similar_s, full_s)


def _mean(found: Sequence[Alike]) -> Alike:
    def of(name: str) -> float:
        return float(sum(getattr(each, name) for each in found) / len(found))

    numbers = [of(name) for name in ("computed", "kl", "first_kl", "top1", "similar_s", "full_s")]
    return Alike(found[0].change, found[0].tokens, all(each.used for each in found), *numbers)
