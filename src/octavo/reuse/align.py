"""Which runs of a prompt's tokens stand in other prompts as well, anywhere and in any order.

Every stretch of `least` tokens of the other prompts is hashed, and so is every stretch of the prompt: equal hashes are
candidates, and token ids decide. So no run of `least` equal tokens is missed, wherever it begins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.reuse.record import Tokens
from octavo.reuse.tree import common

MOST = 256  # places of one stretch that are tried: a text that repeats itself has too many
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Run(NamedTuple):
    """Tokens `at` up to `at + length` of a prompt, which another one, `source`, has from `first` on."""

    at: int
    source: int
    first: int
    length: int


def align(tokens: Tokens, sources: Sequence[Tokens], least: int, begin: int = 0) -> list[Run]:
    """Runs of at least `least` equal tokens, in order, none of which overlap; the first token looked at is `begin`.

    At each token that no run covers yet the longest run that starts there is taken, of equally long ones the one that
    stands where the prompt has it, else the first.
    """
    places = [(s, j) for s, source in enumerate(sources) for j in range(len(source) - least + 1)]
    if not places or len(tokens) - begin < least:
        return []
    hashes = np.concatenate([_hashes(source, least) for source in sources])
    order = hashes.argsort(kind="stable")
    ranked, wanted = hashes[order], _hashes(tokens, least)
    low, high = np.searchsorted(ranked, wanted, "left"), np.searchsorted(ranked, wanted, "right")
    runs, at = [], begin
    while at < len(wanted):
        if low[at] == high[at]:
            at += 1
            continue
        best, rank = Run(at, 0, 0, 0), (0, False)
        for place in order[low[at] : min(high[at], low[at] + MOST)]:
            source, first = places[place]
            length = common(tokens[at:], sources[source][first:])
            if (length, first == at) > rank:
                best, rank = Run(at, source, first, length), (length, first == at)
        if best.length >= least:
            runs.append(best)
        at += max(1, best.length)
    return runs


def _hashes(tokens: Tokens, least: int) -> NDArray[np.uint64]:
    """A hash of each stretch of `least` tokens, uint64 [n - least + 1]; arithmetic is modulo 2^64."""
    count = len(tokens) - least + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    scrambled = (tokens.astype(np.uint64) + np.uint64(1)) * _FACTOR
    scrambled ^= scrambled >> np.uint64(29)
    out = np.zeros(count, np.uint64)
    for i in range(least):
        out = out * _FACTOR + scrambled[i : i + count]
    return out
