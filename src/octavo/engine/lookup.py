"""Prompt lookup: what may follow, guessed from what followed the same tokens earlier in a request's own text."""

from collections.abc import Sequence

NGRAMS = (3, 2)  # how many of the last tokens must have stood there before, the most first


def looked_up(tokens: Sequence[int], most: int) -> list[int]:
    """At most so many tokens that followed when the last few of `tokens` came before; empty where they did not."""
    for n in NGRAMS:
        tail = list(tokens[-n:])
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at + n - 1] == tail[-1] and tokens[at : at + n] == tail:
                return list(tokens[at + n : at + n + most])
    return []
