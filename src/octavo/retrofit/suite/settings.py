"""What the long suite is asked for."""

from dataclasses import dataclass

from octavo.errors import ConfigError

SMALLEST = 1800  # tokens of a context: two passages, and both again, need most of that


@dataclass(frozen=True)
class LongSettings:
    """How much is measured. Lengths are in tokens; raises ConfigError for impossible ones.

    `texts`: pieces of `nll_length` tokens of each text, scored past token `nll_from`. `cases`: answers asked for in
    each row of the table at each of `lengths`; a context asks for several. `held_at`: tokens after which a cache's
    bytes are counted. `answer`: tokens of the model's own greedy answers. `batch_tokens`: tokens in one forward.
    `baselines`: measure the training-free policies at the bytes of the first gates, or of all where `every_budget`.
    """

    texts: int = 24
    cases: int = 200
    nll_length: int = 8192
    nll_from: int = 1024
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    held_at: int = 8000
    answer: int = 64
    batch_tokens: int = 32768
    seed: int = 0
    baselines: bool = True
    every_budget: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.nll_from < self.nll_length:
            raise ConfigError(f"nll_from must lie within nll_length, {self.nll_length:,}; it is {self.nll_from:,}")
        if min(self.texts, self.cases, self.answer, self.batch_tokens, self.held_at) < 1:
            raise ConfigError("texts, cases, answer, batch_tokens and held_at must be at least 1")
        if any(n < SMALLEST for n in self.lengths):
            raise ConfigError(f"lengths of contexts must be at least {SMALLEST:,} tokens, not {min(self.lengths):,}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in 0..2**63 - 1, not {self.seed}")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    @property
    def longest(self) -> int:
        """The most tokens that a text must have, and a model positions for."""
        return max((self.nll_length, self.held_at, *self.lengths))
