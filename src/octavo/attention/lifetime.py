"""A window as the visibility rule has it: an expiry that every token of a layer gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """How long every token of a layer is visible, whatever gates say: how windows become expiries.

    A sliding window: to `length` queries, its own the first. `chunked`: to the end of its chunk, of which each has
    `length` tokens, counted from the sequence's first.
    """

    length: int
    chunked: bool = False

    def __post_init__(self) -> None:
        assert self.length > 0
