"""What computing and loading cost, as measured: a tier that is slower than the model is passed over."""

from collections import Counter
from collections.abc import Mapping

WEIGHT = 0.3  # of the newest measurement in the running mean
MOST = 1000  # namespaces of which something is known
AGAIN = 16  # a tier that was passed over so often is measured again, since it may have been busy


class Costs:
    """Seconds per token by namespace, and per byte by the tier that is loaded from, as running means."""

    def __init__(self) -> None:
        self.per_token: dict[str, float] = {}
        self.per_byte: dict[str, float] = {}
        self._passed: dict[str, Counter[tuple[str, ...]]] = {}

    def computed(self, space: str, tokens: int, seconds: float) -> None:
        """Take note of a prompt's computation."""
        self.per_token[space] = _mean(self.per_token.pop(space, None), seconds / tokens)
        if len(self.per_token) > MOST:
            oldest = next(iter(self.per_token))
            del self.per_token[oldest]
            self._passed.pop(oldest, None)

    def loaded(self, tier: str, nbytes: int, seconds: float) -> None:
        """Take note of a record that was read and checked, or would have taken longer than so many seconds."""
        if nbytes:
            self.per_byte[tier] = _mean(self.per_byte.get(tier), seconds / nbytes)

    def worth_loading(self, space: str, nbytes: Mapping[str, int], tokens: int) -> bool:
        """Whether reading so many bytes from each tier is faster than computing so many tokens, as far as is known."""
        token = self.per_token.get(space)
        loading = sum(size * self.per_byte.get(tier, 0.0) for tier, size in nbytes.items())
        if token is None or loading <= token * tokens:
            return True
        passed = self._passed.setdefault(space, Counter())
        passed[tuple(nbytes)] += 1
        return passed[tuple(nbytes)] % AGAIN == 0


def _mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - WEIGHT) * before + WEIGHT * new
