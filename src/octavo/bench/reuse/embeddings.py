"""What nominates similar prompts: how often each kind of embedding finds the stored prompt that helps, and its price.

All stored prompts have one instruction and one question around neighbouring pieces of a text; each is looked for by
changed prompts. The search itself is exact (cosine), so that embeddings alone make the difference.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.bench.reuse.similar import EDIT, FIRST, QUESTION, SECOND
from octavo.errors import ConfigError, ModelNotFoundError
from octavo.vdb.embed import MINILM, PIECES, load_embedder

EARLY = 2  # layers whose hidden states may serve
NOMINATED = 4  # as many as `octavo.SimilarSettings` has looked into
Embed = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class Nominating:
    """One embedding. `first`: share of changed prompts by change whose own stored prompt is the nearest one; `among`:
    that it is among the nearest four. `ms`: milliseconds that one prompt's embedding takes, the median."""

    embedding: str
    stored: int
    tokens: int
    first: dict[str, float]
    among: dict[str, float]
    ms: float


def nominating(
    model: PreTrainedModel, plain: Any, tokenizer: Any, ids: Sequence[int], document: int, most: int = 64
) -> list[Nominating]:
    """All embeddings that are at hand; `plain` is the same model, unattached, which loses its later layers here.

    Raises ConfigError for a text of fewer than four documents.
    """
    pieces = [list(ids[at : at + document]) for at in range(0, len(ids) - document + 1, document)][:most]
    if len(pieces) < NOMINATED:
        raise ConfigError(f"{len(ids)} tokens are not {NOMINATED} documents of {document}: give a longer --text")
    first, second, question = (tokenizer(text, verbose=False)["input_ids"] for text in (FIRST, SECOND, QUESTION))
    stored = [first + text + question for text in pieces]
    changed: dict[str, list[list[int]]] = {"instruction": [], "edit": [], "swapped": [], "a third of it": []}
    for i, text in enumerate(pieces):
        half, other = document // 2, pieces[i - 1][:EDIT]
        changed["instruction"].append(second + text + question)
        changed["edit"].append(first + text[:half] + other + text[half + EDIT - 2 :] + question)
        changed["swapped"].append(first + text[half:] + text[:half] + question)
        changed["a third of it"].append(second + text[document // 3 : 2 * document // 3] + question)
    return [_measured(name, embed, stored, changed) for name, embed in _embeddings(model, plain, tokenizer).items()]


def _embeddings(model: PreTrainedModel, plain: Any, tokenizer: Any) -> dict[str, Embed]:
    from octavo.attachment.similar import mean_embedding

    attachment: Any = model.__dict__["_octavo"]
    base = plain.base_model
    base.layers = base.layers[:EARLY]
    base.config.num_hidden_layers = EARLY

    @torch.no_grad()
    def early(ids: Sequence[int]) -> torch.Tensor:
        hidden: torch.Tensor = base(torch.tensor([ids], device=base.device), use_cache=False).last_hidden_state
        return hidden[0].float().mean(0)

    found: dict[str, Embed] = {
        "input embeddings (default)": lambda ids: torch.tensor(mean_embedding(attachment, ids)),
        f"hidden states, layer {EARLY}": early,
    }
    try:
        embed = load_embedder(MINILM).embed
    except ModelNotFoundError:
        return found
    found[f"MiniLM, first {PIECES} pieces"] = lambda ids: torch.from_numpy(embed([tokenizer.decode(ids)])[0])

    def windows(ids: Sequence[int]) -> torch.Tensor:
        parts = [tokenizer.decode(ids[at : at + PIECES - 56]) for at in range(0, len(ids), PIECES - 56)]
        return torch.from_numpy(embed(parts)).mean(0)

    found["MiniLM, mean of windows"] = windows
    return found


def _measured(name: str, embed: Embed, stored: Sequence[list[int]], changed: dict[str, list[list[int]]]) -> Nominating:
    seconds = []

    def of(prompt: list[int]) -> torch.Tensor:
        began = time.perf_counter()
        vector = embed(prompt)
        seconds.append(time.perf_counter() - began)
        return torch.nn.functional.normalize(vector.float().cpu(), dim=0)

    embed(stored[0])  # what a first call costs is no matter
    have = torch.stack([of(prompt) for prompt in stored])
    first, among = {}, {}
    for change, prompts in changed.items():
        nearest = (torch.stack([of(p) for p in prompts]) @ have.T).topk(NOMINATED).indices
        right = nearest == torch.arange(len(prompts))[:, None]
        first[change], among[change] = (float(x.float().mean()) for x in (right[:, 0], right.any(1)))
    return Nominating(name, len(stored), len(stored[0]), first, among, sorted(seconds)[len(seconds) // 2] * 1e3)
