"""What computing and loading cost, as measured: a tier that is slower than the model is passed over."""

from collections import Counter

WEIGHT = 0.3  # of the newest measurement in the running mean
MOST = 1000  # namespaces of which something is known
AGAIN = 16  # a tier that was passed over so often is measured again, since it may have been busy


class Costs:
    """Seconds per token by namespace and seconds per byte from disk, as running means."""

    def __init__(self) -> None:
        self.per_token: dict[str, float] = {}
        self.per_byte: float | None = None
        self._passed: Counter[str] = Counter()

    def computed(self, space: str, tokens: int, seconds: float) -> None:
        """Take note of a prompt's computation."""
        self.per_token[space] = _mean(self.per_token.pop(space, None), seconds / tokens)
        if len(self.per_token) > MOST:
            oldest = next(iter(self.per_token))
            del self.per_token[oldest], self._passed[oldest]

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Take note of a file that was read and checked."""
        if nbytes:
            self.per_byte = _mean(self.per_byte, seconds / nbytes)

    def worth_loading(self, space: str, nbytes: int, tokens: int) -> bool:
        """Whether reading so many bytes from disk is faster than computing so many tokens, as far as is known."""
        token, byte = self.per_token.get(space), self.per_byte
        if token is None or byte is None or byte * nbytes <= token * tokens:
            return True
        self._passed[space] += 1
        return self._passed[space] % AGAIN == 0


def _mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - WEIGHT) * before + WEIGHT * new
