"""Which records stay: "lru" against "slru" on prompts of which a few come again and many come once. No model runs."""

import itertools
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from octavo.reuse.shelf import POLICIES, Rules, Shelf


@dataclass(frozen=True)
class Policy:
    """How a policy did: the share of prompts that hit, of those that had come before and of all of them. `once`: the
    share of prompts that came once."""

    policy: str
    once: float
    again_hit: float
    hit: float


class _Hashable(SimpleNamespace):
    """What a shelf asks of a record, without slots."""

    __hash__ = object.__hash__  # type: ignore[assignment]


_ENTRY = SimpleNamespace(tenant="")


def compared(prompts: int = 4000, popular: int = 40, room: int = 30, seed: int = 0) -> list[Policy]:
    """Requests for `popular` documents (Zipf's law) among prompts that come once in bursts, `room` documents fit."""
    return [_run(policy, noise, prompts, popular, room, seed) for noise in (0.0, 0.5, 0.8, 0.95) for policy in POLICIES]


def _run(policy: str, noise: float, prompts: int, popular: int, room: int, seed: int) -> Policy:
    dice, order = random.Random(seed), itertools.count()
    shelf = Shelf(Rules(room, policy, {}), lambda record: 1, lambda record, leaving: True)
    held: dict[int, Any] = {}
    weights = [1 / (i + 1) for i in range(popular)]
    seen: set[int] = set()
    again = again_hit = hits = burst = noises = 0
    for i in range(prompts):
        burst = burst - 1 if burst else dice.randrange(1, 2 * room) if dice.random() < noise / room else 0
        once = burst > 0 or dice.random() < noise / 2
        noises += once
        which = popular + i if once else dice.choices(range(popular), weights)[0]
        hit = which in held
        again, again_hit, hits = again + (which in seen), again_hit + (hit and which in seen), hits + hit
        seen.add(which)
        if hit:
            held[which].order = next(order)
            shelf.used(held[which])
            continue
        leaving: Any = shelf.leaving(1, "", 0.0) or ()
        for each in leaving:
            shelf.remove(each)
            del held[each.which]
        record: Any = _Hashable(which=which, order=next(order), ends=math.inf, users=0, entry=_ENTRY)
        held[which] = record
        shelf.add(record)
    return Policy(policy, noises / prompts, again_hit / max(1, again), hits / prompts)
