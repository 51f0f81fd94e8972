"""What a request asks of sampling. The names and meanings are those of the OpenAI API and of vLLM."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ConfigError

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in vLLM
_INT64 = 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the tokens of one request, and when to stop. Each field is checked when it is made.

    `temperature`: 0 (or below 1e-5) is greedy. `top_k`: so many of the likeliest tokens stay, with all that equal the
    last of them; 0 for off. `top_p`: a token stays while those likelier than it hold less than this share of the
    probability; 1 for off. `min_p`: a token stays from this share of the likeliest token's probability on; 0 for off.

    `repetition_penalty`: positive logits of tokens in prompt or output are divided by it, negative ones multiplied.
    `frequency_penalty` is subtracted for each time that a token is in the output, `presence_penalty` once.
    `logit_bias`: {token: what is added to its logit}, from -100 to 100.

    `seed`: the output depends on it, not on what else runs; None: a new one for each request. `n`: samples of the
    prompt, with seeds one after another. `max_tokens`: at most so many are produced; the model's end of text and
    `stop_token_ids` cannot come before `min_tokens`, and stop strings do not count. `stop`: one string or several that
    end the output. `ignore_eos`: go on past the model's end of text.

    `logprobs`: None, or how many alternatives to report with each token's log-probability (0: the token's only).

    Raises ConfigError for impossible values.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    n: int = 1

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 1e6)
        _whole("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 1e6, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, -_INT64, _INT64 - 1)
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; it must not be more")
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0)
        _whole("n", self.n, 1)
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _tokens(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether always the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether tokens of the prompt or output change the logits."""
        return self.repeats or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def repeats(self) -> bool:
        """Whether tokens of the prompt change the logits."""
        return self.repetition_penalty != 1


@dataclass(frozen=True)
class Work:
    """What the requests in a sampler need, known on the host. A CUDA graph of `sample` holds for one of these."""

    random: bool = False  # some request draws
    floors: bool = False  # some of these uses min_p
    prefix: int = 0  # so many of the largest logits are looked at, for top_k and top_p
    nucleus: bool = False  # top_p
    edits: bool = False  # logit_bias or min_tokens
    penalties: bool = False
    repetition: bool = False
    logprobs: int | None = None

    @staticmethod
    def of(requests: Sequence[SamplingParams], vocab_size: int) -> "Work":
        """What these need together."""
        drawn = [p for p in requests if not p.greedy]
        sizes = [p.top_k if 0 < p.top_k < vocab_size else vocab_size if p.top_p < 1 else 0 for p in drawn]
        return Work(
            random=bool(drawn),
            floors=any(p.min_p > 0 for p in drawn),
            prefix=max(sizes, default=0),
            nucleus=any(p.top_p < 1 for p in drawn),
            edits=any(p.logit_bias or p.min_tokens for p in requests),
            penalties=any(p.penalised for p in requests),
            repetition=any(p.repeats for p in requests),
            logprobs=max((p.logprobs for p in requests if p.logprobs is not None), default=None),
        )


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ConfigError(f"{name} must be a whole number {allowed}, not {value!r}")


def _number(name: str, value: Any, least: float, most: float, above: bool = False) -> None:
    """`above`: `least` itself is not allowed."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value > most or value < least or (above and value == least):
        raise ConfigError(
            f"{name} must be a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} "
            f"{most:g}, not {value!r}"
        )


def _strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (None,)
    if not all(isinstance(each, str) and each for each in stops):
        raise ConfigError(f"stop must be a string or a sequence of strings, none of them empty, not {stop!r}")
    return stops


def _tokens(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise ConfigError(f"stop_token_ids must be a sequence of tokens, not {ids!r}")
    for token in ids:
        _whole("each of stop_token_ids", token, 0)
    return tuple(ids)


def _biases(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias must be a mapping from token to number, not {bias!r}")
    for token, value in bias.items():
        _whole("a token of logit_bias", token, 0)
        _number(f"logit_bias of token {token}", value, -100, 100)
    return {token: float(value) for token, value in bias.items()}
