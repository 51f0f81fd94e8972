"""Requests as they come in practice, made of a text's tokens; the same for the same text and seed."""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

ANSWER = 24  # tokens that each request of a trace generates


class Ask(NamedTuple):
    """One request: a prompt, or where `goes_on` what follows the answer of the request before."""

    tokens: list[int]
    goes_on: bool = False


class Trace(NamedTuple):
    """Requests one after another."""

    name: str
    asks: list[Ask]


class Cuts:
    """Cuts pieces out of a text, another one each time."""

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self.ids, self.dice = list(ids), random.Random(seed)

    def piece(self, n: int) -> list[int]:
        """n consecutive tokens."""
        at = self.dice.randrange(max(1, len(self.ids) - n))
        return (self.ids[at : at + n] * (n // max(1, len(self.ids)) + 1))[:n]


def traces(ids: Sequence[int], document: int, questions: int, seed: int = 0) -> list[Trace]:
    """All traces; `document` is the length of the long text, `questions` how many requests a trace has."""
    cuts = Cuts(ids, seed)
    text, other, system = cuts.piece(document), cuts.piece(document), cuts.piece(document // 4)
    shared = [Ask(text + cuts.piece(30)) for _ in range(questions)]
    chat = [Ask(cuts.piece(document // 8)), *(Ask(cuts.piece(60), True) for _ in range(7))]
    prompts = [Ask(system + cuts.piece(document // 8)) for _ in range(questions)]
    edited = []
    for _ in range(questions):
        at = cuts.dice.randrange(document)
        edited.append(Ask([*other[:at], *cuts.piece(5), *other[at:], *cuts.piece(30)]))
    parts, orders = [cuts.piece(document // 4) for _ in range(4)], []
    for _ in range(questions):
        cuts.dice.shuffle(parts)
        orders.append(Ask([*itertools.chain(*parts), *cuts.piece(30)]))
    noise = [Ask(cuts.piece(document // 2)) for _ in range(max(1, questions // 2))]
    mixed = [ask for pair in zip(shared[: len(noise)], noise, strict=True) for ask in pair]
    return [
        Trace("one document, many questions", shared),
        Trace("a chat of eight turns", chat),
        Trace("a system prompt", prompts),
        Trace("a document that is edited", edited),
        Trace("documents in changing order", orders),
        Trace("questions among prompts that come once", mixed),
    ]
