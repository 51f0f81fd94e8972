"""Sampling: logits [B, V] to tokens [B], on the model's device, without a host read.

The order is vLLM's: what a grammar allows -> logit bias, and no end before min_tokens -> penalties -> temperature ->
min_p, top_k, top_p -> draw.

**Draw.** argmax(logits / temperature + noise) with Gumbel noise is a draw from softmax(logits / temperature); written
as argmax(logits + temperature * noise) it is greedy at temperature 0. A token's noise is a hash of (seed, position,
token), so neither the other rows of the batch nor the filters change it. The hash is SplitMix64 (Steele, Lea, Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), whose i-th number from a start s is mix(s + i * GOLDEN):
number position + 1 from the start mix(seed) is the row's start, and number token + 1 from there is the token's.

**Filters.** Each keeps the tokens from some logit on, so they come down to one threshold a row, and equal tokens are
kept or dropped together. Sums of probabilities are sums of integers (weights in units of 2**-40 of the likeliest), so
neither the order of summing nor the batch changes them.

Work that no request in the sampler asked for is not done; what is done for others leaves a row as it is, to the bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.engine.sampling_params import GREEDY_BELOW, SamplingParams, Work
from octavo.errors import ConfigError

__all__ = ["Allowed", "Sampled", "Sampler", "SamplingParams", "Work", "gumbel", "thresholds", "uniform"]

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # these three as int64, whose products wrap around as those of uint64 do
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
PARTS = 128  # of a row on a GPU, see `likeliest`
_UNIT = 2.0**40  # a weight of 1 as an integer; a vocabulary of 2**22 such weights fits int64


class Sampled(NamedTuple):
    """One token for each row. Log-probabilities are the raw model's: log-softmax of the logits as they were given,
    before a grammar's mask, bias, penalties, temperature and filters.
    """

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] float32, of these tokens; NaN where no request in the sampler asks for logprobs
    top_tokens: Tensor | None = None  # [B, k] int64, likeliest first, k the most that any request asks for
    top_logprobs: Tensor | None = None  # [B, k] float32

    def alternatives(self, row: int, count: int) -> dict[int, float]:
        """{token: log-probability} of the `count` likeliest tokens of a row and of its own. Reads the tensors."""
        found = {}
        if self.top_tokens is not None and self.top_logprobs is not None:
            found = dict(
                zip(self.top_tokens[row, :count].tolist(), self.top_logprobs[row, :count].tolist(), strict=True)
            )
        return found | {int(self.tokens[row]): float(self.logprobs[row])}


class Allowed(NamedTuple):
    """What grammars allow in some rows of a batch (see `octavo.engine.grammar.allowed`); other rows are free."""

    rows: Tensor  # [R] int64, each once
    bits: Tensor  # [R, ceil(V / 32)] int32; token t is bit t % 32 of word t // 32


class Rows(NamedTuple):
    """The parameters of a batch's rows."""

    temperature: Tensor  # [B, 1] float32, 0: greedy
    top_p: Tensor  # [B, 1] float64
    floor: Tensor  # [B, 1] float32, how far below the largest logit min_p lets one be, -inf: any
    repetition: Tensor  # [B, 1] float32
    frequency: Tensor  # [B, 1] float32
    presence: Tensor  # [B, 1] float32
    top_k: Tensor  # [B, 1] int64, 0: off
    seed: Tensor  # [B] int64
    short_until: Tensor  # [B] int64, at positions below it the output may not end


_NEUTRAL = ((0.0, 1.0, -math.inf, 1.0, 0.0, 0.0), (0, 0, 0))  # a greedy row, in the order of `Rows`


class Sampler:
    """The sampling of up to `capacity` requests, each in a slot of its own.

    `eos`: the model's ends of text. Rows of a batch that stand for no request (the padding of a CUDA graph) name slot
    `capacity`. Requests are added and removed between steps; only `add` copies to the device, and nothing is read back.
    Counts of tokens (int32 [capacity + 1, V]) are allocated when a request first uses a penalty, and stay.
    """

    def __init__(self, capacity: int, vocab_size: int, device: torch.device | str, eos: Sequence[int] = ()) -> None:
        self.capacity, self.vocab_size, self.device = capacity, vocab_size, torch.device(device)
        self.eos = tuple(token for token in eos if token < vocab_size)
        self.work = Work()
        self._requests: dict[int, SamplingParams] = {}
        self._real = torch.tensor(_NEUTRAL[0], dtype=torch.float64, device=device).repeat(capacity + 1, 1)
        self._whole = torch.tensor(_NEUTRAL[1], device=device).repeat(capacity + 1, 1)
        self._steps = torch.arange(1, vocab_size + 1, device=device) * GOLDEN  # [V] int64
        token = torch.arange(vocab_size, device=device)
        self._word, self._bit = token // 32, (token % 32).int()  # [V], where `Allowed` has a token
        self._unasked = torch.full((1,), math.nan, device=device)
        self._edits = _Edits(capacity, self.device)
        self._counts: Tensor | None = None  # [capacity + 1, V] int32, how often tokens are in the output
        self._prompts: Tensor | None = None  # [capacity + 1, V] bool, whether tokens are in the prompt

    def add(
        self, slot: int, params: SamplingParams, prompt_ids: Sequence[int], seed: int, output_ids: Sequence[int] = ()
    ) -> None:
        """Put a request into a free slot. `output_ids`: what it has produced already, for one that was preempted.

        `seed` is taken modulo 2**64. The i-th of n samples of a prompt should get seed + i: these hash to unrelated
        noise.

        Raises ConfigError where `params` name tokens that the vocabulary lacks, and nothing has changed then.
        """
        assert 0 <= slot < self.capacity, slot
        assert slot not in self._requests, slot
        edits = self._edits_of(params)
        temperature = 0.0 if params.greedy else params.temperature
        floor = temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf
        real = (temperature, params.top_p, floor, params.repetition_penalty, params.frequency_penalty,
                params.presence_penalty)  # fmt: skip
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        self._real[slot] = self._sent(real, torch.float64)
        self._whole[slot] = self._sent(
            (top_k, (seed + 2**63) % 2**64 - 2**63, len(prompt_ids) + params.min_tokens), torch.int64
        )
        self._edits.put(slot, edits)
        if params.penalised:
            self._count(slot, output_ids)
        if params.repeats:
            self._read(slot, prompt_ids)
        self._requests[slot] = params
        self.work = Work.of(list(self._requests.values()), self.vocab_size)

    def check(self, params: SamplingParams) -> None:
        """Raise what `add` would, before anything has been computed for a request."""
        self._edits_of(params)

    def remove(self, slot: int) -> None:
        """Free a slot. Steps that are under way may still name it; nothing on the device changes."""
        del self._requests[slot]
        self.work = Work.of(list(self._requests.values()), self.vocab_size)

    def sample(self, logits: Tensor, slots: Tensor, position: Tensor, allowed: Allowed | None = None) -> Sampled:
        """Choose one token for each row of `logits` [B, V], any float dtype, which stay as they are.

        `slots` [B] int64: whose rows these are, a request once at most. `position` [B], int32 or int64: where in its
        sequence each token will stand, the first one at the length of its prompt. A row of NaN, or one in which nothing
        is allowed, gets some token and, where logprobs are asked for, possibly NaN with it; the other rows are fine.
        """
        work, scores = self.work, logits
        if allowed is not None or work.edits or work.penalties or work.random:
            rows, position = self._rows(slots), position.long()
            scores = logits.to(torch.float32, copy=True)
            if allowed is not None:
                self._forbid(scores, allowed)
            if work.edits:
                self._edits.apply(scores, slots, position < rows.short_until)
            if work.penalties:
                scores = self._penalised(scores, slots, rows)
            if work.random:
                scores = self._noisy(scores, rows, position)
        tokens = likeliest(scores, PARTS if scores.is_cuda else 1)
        if work.penalties and self._counts is not None:
            self._counts.view(-1).scatter_add_(0, slots * self.vocab_size + tokens, torch.ones_like(tokens).int())
        return self._logprobs(logits, tokens)

    def _noisy(self, scores: Tensor, rows: Rows, position: Tensor) -> Tensor:
        """Scores whose largest is a draw."""
        noise = gumbel(rows.seed, position, self._steps)
        drawn = torch.addcmul(scores, noise, rows.temperature)
        if self.work.floors or self.work.prefix:
            drawn.masked_fill_(scores < thresholds(scores, rows, self.work), -math.inf)
        return drawn

    def _rows(self, slots: Tensor) -> Rows:
        real, whole = self._real.index_select(0, slots), self._whole.index_select(0, slots)
        single = real.float()
        temperature, _, floor, repetition, frequency, presence = (single[:, i : i + 1] for i in range(6))
        top_k, seed, short_until = whole[:, :1], whole[:, 1], whole[:, 2]
        return Rows(temperature, real[:, 1:2], floor, repetition, frequency, presence, top_k, seed, short_until)

    def _forbid(self, scores: Tensor, allowed: Allowed) -> None:
        assert allowed.bits.shape[1] * 32 >= self.vocab_size, "a grammar for another vocabulary"
        bits = allowed.bits.index_select(1, self._word) >> self._bit  # [R, V]
        masked = scores.index_select(0, allowed.rows).masked_fill_((bits & 1) == 0, -math.inf)
        scores.index_copy_(0, allowed.rows, masked)

    def _penalised(self, scores: Tensor, slots: Tensor, rows: Rows) -> Tensor:
        assert self._counts is not None
        counts = self._counts.index_select(0, slots)
        if self.work.repetition:
            assert self._prompts is not None
            seen = self._prompts.index_select(0, slots) | (counts > 0)
            scores = torch.where(seen, repeated(scores, rows.repetition), scores)
        scores = scores - rows.frequency * counts
        return scores - rows.presence * (counts > 0)

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> Sampled:
        k = self.work.logprobs
        if k is None:
            return Sampled(tokens, self._unasked.expand(len(tokens)))
        raw = logits.float()
        total = raw.logsumexp(-1, keepdim=True)
        own = (raw.gather(-1, tokens[:, None]) - total)[:, 0]
        if k == 0:
            return Sampled(tokens, own)
        top = raw.topk(min(k, self.vocab_size))
        return Sampled(tokens, own, top.indices, top.values - total)

    # What `add` writes

    def _edits_of(self, params: SamplingParams) -> dict[int, tuple[float, float]]:
        """By token: what is added to its logit, and what is added on top while the output is short."""
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self.eos)) if params.min_tokens else ()
        edits = {token: (bias, 0.0) for token, bias in params.logit_bias.items()}
        edits |= {token: (params.logit_bias.get(token, 0.0), -math.inf) for token in ends}
        beyond = sorted(token for token in edits if token >= self.vocab_size)
        if beyond:
            raise ConfigError(
                f"logit_bias or stop_token_ids name token {beyond[0]}; the model has tokens 0 to {self.vocab_size - 1}"
            )
        return edits

    def _count(self, slot: int, output_ids: Sequence[int]) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self.capacity + 1, self.vocab_size, dtype=torch.int32, device=self.device)
        self._counts[slot].zero_()
        if output_ids:
            ids = self._sent(output_ids, torch.int64)
            self._counts[slot].scatter_add_(0, ids, torch.ones_like(ids).int())

    def _read(self, slot: int, prompt_ids: Sequence[int]) -> None:
        if self._prompts is None:
            self._prompts = torch.zeros(self.capacity + 1, self.vocab_size, dtype=torch.bool, device=self.device)
        self._prompts[slot].zero_()
        ids = [token for token in prompt_ids if token < self.vocab_size]  # others, of pictures, cannot come again
        self._prompts[slot].index_fill_(0, self._sent(ids, torch.int64), True)

    def _sent(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return _sent(torch.tensor(values, dtype=dtype), self.device)


class _Edits:
    """Numbers added to a few logits of each slot; the rows are as wide as the longest list so far (a power of two)."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._tokens = torch.zeros(capacity + 1, 1, dtype=torch.int64, device=device)
        self._values = torch.zeros(capacity + 1, 1, 2, device=device)  # always added, and added while short

    def put(self, slot: int, edits: dict[int, tuple[float, float]]) -> None:
        """Replace a slot's list."""
        width = self._tokens.shape[1]
        more = (1 << (len(edits) - 1).bit_length() if edits else 1) - width
        if more > 0:
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
            self._values = torch.nn.functional.pad(self._values, (0, 0, 0, more))
        self._values[slot].zero_()  # what is past the list adds 0 to some token
        if edits:
            device = self._tokens.device
            self._tokens[slot, : len(edits)] = _sent(torch.tensor(list(edits)), device)
            self._values[slot, : len(edits)] = _sent(torch.tensor(list(edits.values())), device)

    def apply(self, scores: Tensor, slots: Tensor, short: Tensor) -> None:
        """Add to `scores` [B, V] in place; `short` [B] bool."""
        always, early = self._values.index_select(0, slots).unbind(-1)
        added = always + early.masked_fill(~short[:, None], 0)
        scores.scatter_add_(1, self._tokens.index_select(0, slots), added)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def likeliest(scores: Tensor, parts: int) -> Tensor:
    """argmax(-1) of scores [B, V], by parts of rows where V has so many: a GPU gives a row one block at a time."""
    parts = math.gcd(parts, scores.shape[1])
    if parts == 1:
        return scores.argmax(-1)
    best, places = scores.reshape(len(scores), parts, -1).max(-1)
    part = best.argmax(-1, keepdim=True)
    found: Tensor = part * (scores.shape[1] // parts) + places.gather(1, part)
    return found.squeeze(1)


def repeated(scores: Tensor, penalty: Tensor) -> Tensor:
    """Logits [B, V] under a repetition penalty [B, 1] (Keskar et al., "CTRL", 2019; the form for negative logits is
    Hugging Face's)."""
    return torch.where(scores > 0, scores / penalty, scores * penalty)


def thresholds(scores: Tensor, rows: Rows, work: Work) -> Tensor:
    """The logit [B, 1] from which on tokens stay; -inf: all do. The largest logit of a row always stays."""
    prefix = min(work.prefix, scores.shape[-1])
    if prefix == 0:
        return scores.amax(-1, keepdim=True) + rows.floor
    whole = prefix == scores.shape[-1]
    top = _falling(scores) if whole else scores.topk(prefix)[0]  # [B, prefix]
    last = top.gather(-1, (rows.top_k - 1).clamp(0, prefix - 1))
    bound = last.masked_fill(rows.top_k == 0, -math.inf).maximum(top[:, :1] + rows.floor)
    if not work.nucleus:
        return bound
    scale = rows.temperature.clamp(min=GREEDY_BELOW)  # greedy rows keep their largest logit, whatever else
    weights = _weights(top, top[:, :1], bound, scale)
    every = weights if whole else _weights(scores, top[:, :1], bound, scale)
    total = every.sum(-1, keepdim=True)
    likelier = weights.cumsum(-1) - weights
    stay = (likelier.double() < rows.top_p * total.double()).sum(-1, keepdim=True)
    nucleus = top.gather(-1, (stay - 1).clamp(min=0)).masked_fill(rows.top_p >= 1, -math.inf)
    return bound.maximum(nucleus)


def _falling(scores: Tensor) -> Tensor:
    """Sorted, largest first. NumPy sorts values alone: 1.6 ms for 49,152 on a core, where torch takes 5.5."""
    if scores.is_cpu:
        return torch.from_numpy(np.sort(scores.numpy(), -1)).flip(-1)
    return scores.sort(-1, descending=True)[0]


def _weights(scores: Tensor, largest: Tensor, bound: Tensor, scale: Tensor) -> Tensor:
    """exp((scores - largest) / scale) as int64 in units of 1 / _UNIT, 0 below `bound`."""
    return ((scores - largest) / scale).exp_().mul_(_UNIT).masked_fill_(scores < bound, 0).long()


def uniform(seed: Tensor, position: Tensor, steps: Tensor) -> Tensor:
    """Numbers in (0, 1), float32 [B, V], from seed and position [B] int64. `steps` [V] int64: (token + 1) * GOLDEN.

    Small numbers are as fine as 2**-53, large ones end at 1 - 2**-24.
    """
    start = _mix(_mix(seed.clone()) + (position + 1) * GOLDEN)
    number = _mix(start[:, None] + steps)
    unit = number.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).float().mul_(2.0**-53)
    return unit.clamp_(2.0**-54, 1 - 2.0**-24)


def gumbel(seed: Tensor, position: Tensor, steps: Tensor) -> Tensor:
    """Gumbel noise, float32 [B, V]; arguments as in `uniform`. It is finite: from -2.9 to 37.5.

    -log(-log(1 - u)): as the numbers are finest near 0, so is the upper tail, which decides about unlikely tokens.
    """
    return uniform(seed, position, steps).neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place on int64; shifts are of the unsigned number."""
    x.bitwise_xor_((x >> 30).bitwise_and_(2**34 - 1)).mul_(_MIX_1)
    x.bitwise_xor_((x >> 27).bitwise_and_(2**37 - 1)).mul_(_MIX_2)
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))
