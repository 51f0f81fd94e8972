"""Passages and running text out of the sources of a mix."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.retrofit.data import Source
from octavo.retrofit.exercises.item import looks_like_code

Ids = npt.NDArray[np.int64]
TRIES = 8  # for a source with code in it; a mix need not have any


class Reader:
    """Draws from sources in proportion to their shares, without the tokenizer's special tokens."""

    def __init__(self, tokenizer: Any, sources: Sequence[Source]) -> None:
        self.tokenizer, self.sources = tokenizer, sources
        shares = np.array([source.share for source in sources])
        self._shares = shares / shares.sum()
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)

    def running(self, rng: np.random.Generator, length: int) -> Ids:
        """`length` tokens of one source [length] int64, as they stand there but for special tokens."""
        source = self.sources[int(rng.choice(len(self.sources), p=self._shares))]
        pieces: list[Ids] = []
        left = length
        while left > 0:
            ids = source.draw(rng, min(left, len(source.tokens)))
            text = ids[~np.isin(ids, self._special)]
            pieces.append(text if len(text) else ids)  # of nothing but special tokens there is no other text
            left -= len(pieces[-1])
        return np.concatenate(pieces)

    def passage(self, rng: np.random.Generator, least: int, most: int) -> str:
        """A passage of about `least` to `most` tokens, each size on a logarithmic scale equally likely.

        It begins and ends with sentences, or with lines where it is code, as far as the text has such.
        """
        length = int(np.exp(rng.uniform(np.log(least), np.log(most))))
        text = self._decoded(self.running(rng, length + length // 3 + 12))
        return _trimmed(text) or text.strip()

    def code(self, rng: np.random.Generator, least: int, most: int) -> str | None:
        """A passage that looks like code; None where some tries find none."""
        for _ in range(TRIES):
            passage = self.passage(rng, least, most)
            if looks_like_code(passage):
                return passage
        return None

    def _decoded(self, ids: Ids) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _trimmed(text: str) -> str:
    """Cut off what stands before the first beginning and after the last end of a sentence or line."""
    if looks_like_code(text):
        lines = text.split("\n")[1:-1]
        while lines and not lines[0].strip():
            lines = lines[1:]
        return "\n".join(lines).rstrip()
    begins = [m.end() for m in re.finditer(r"[.!?][\"'”’)]?\s+|[。！？]|\n\s*\n", text)]
    first = next((at for at in begins if at < len(text) // 2), 0)
    ends = [m.end() for m in re.finditer(r"[.!?][\"'”’)]?(?=\s)|[。！？]", text)]
    last = next((at for at in reversed(ends) if at > (first + len(text)) // 2), len(text))
    return text[first:last].strip()
