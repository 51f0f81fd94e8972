"""How one policy is measured: the texts and needles of an evaluation, read at once or through a real cache.

A reader turns token ids [B, T] int64 into the last hidden states [B, T, hidden]. Without a cache the model runs once
over all tokens, and what is forgotten is masked. That is the same function as eviction from a cache, but it sees no
pages, so the cost of quantised ones is measured through caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import KVCache, require_attachment
from octavo.attachment.attach import attach
from octavo.dms import HardGates, Policy
from octavo.retrofit.entries import Parts, attach_parts
from octavo.retrofit.needles import needle_cases
from octavo.retrofit.readout import readout
from octavo.retrofit.results import EvaluationSettings, Row
from octavo.swiftkv import SwiftKV

Read = Callable[[Tensor], Tensor]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # as rows name them


@dataclass(frozen=True)
class Held:
    """What a cache holds of one text: mean slots per KV head, bytes, and the bytes of a dense cache."""

    kept: float
    nbytes: int
    dense_nbytes: int

    @staticmethod
    def by(cache: KVCache) -> "Held":
        """What this cache holds, of one sequence."""
        return Held(cache.kept.float().mean().item(), cache.nbytes, cache.dense_nbytes)


def at_once(model: PreTrainedModel, policy: Policy | None, transform: SwiftKV | None = None) -> Read:
    """Reads in one forward without a cache, under a policy (None: dense) and a transform; `model` is attached."""

    @torch.no_grad()
    def read(ids: Tensor) -> Tensor:
        with require_attachment(model).using(policy, transform=transform):
            out: Tensor = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        return out

    return read


class CacheReader:
    """Reads through a new cache of the attached model, in the chunks and with the pages that it was attached with.

    `first` is what the cache of the very first sequence held at its end.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.first: Held | None = None

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Last hidden states [B, T, hidden] of tokens [B, T] int64."""
        cache = KVCache(self.model)
        out = self.model.base_model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True)
        if self.first is None:
            cache.leave(range(1, len(ids)))
            self.first = Held.by(cache)
        hidden: Tensor = out.last_hidden_state
        return hidden


class Bench:
    """The texts and needles of one evaluation, the same for all policies. The model is attached, with no adapters."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, tokens: npt.NDArray[Any], settings: EvaluationSettings
    ) -> None:
        s = settings
        self.model, self.tokens, self.settings = model, tokens, settings
        self.head: Callable[[Tensor], Tensor] = readout(model)
        self.lengths = sorted({*s.lengths, s.nll_length})
        rng = np.random.default_rng(s.seed)
        starts = np.linspace(0, len(tokens) - s.nll_length, s.texts).astype(int)
        self.texts = torch.stack([_long(tokens[first : first + s.nll_length]) for first in starts])
        self.needles = {n: needle_cases(tokenizer, tokens, n, s.cases, s.depths, rng) for n in s.lengths}

    def rows(self, parts: Parts) -> Iterator[Row]:
        """The model dense or with adapters: one row, or one for each page dtype where `settings.kv_dtype` is given."""
        s = self.settings
        if s.kv_dtype is None:
            policy = None if parts.gates is None else HardGates(parts.gates)
            read = at_once(self.model, policy, parts.transform)
            yield self._row(parts.name, lambda length: read, lambda: self.held(parts), parts.skipped)
            return
        names = {None: DTYPES.get(self.model.dtype, str(self.model.dtype)), s.kv_dtype: s.kv_dtype}
        for kv_dtype, name in names.items():
            attach_parts(self.model, parts, chunk=s.chunk, kv_dtype=kv_dtype)
            yield self._through_caches(f"{parts.name} {name}", parts)
        attach(self.model)

    def _through_caches(self, name: str, parts: Parts) -> Row:
        """One row from caches of the model as it is attached now."""
        reader = CacheReader(self.model)
        return self._row(name, lambda length: reader, lambda: reader.first, parts.skipped)

    def rival(self, name: str, policy: Callable[[int], Policy]) -> Row:
        """A training-free policy, made for each length, without a cache."""
        length = self.settings.nll_length
        row = self._row(name, lambda n: at_once(self.model, policy(n)))
        return replace(row, kept=self.kept(policy(length), length))

    def _row(
        self,
        name: str,
        reader: Callable[[int], Read],  # by the length of what is read
        held: Callable[[], Held | None] = lambda: None,  # asked when all is read
        skipped: float | None = None,
    ) -> Row:
        s = self.settings
        nll = self.nll(reader(s.nll_length))
        found = {n: self.found(reader(n), n) for n in s.lengths}
        depth = {n: [_mean(hits[i :: len(s.depths)]) for i in range(len(s.depths))] for n, hits in found.items()}
        row = Row(name, nll, {n: _mean(hits) for n, hits in found.items()}, depth, s.nll_length, skipped=skipped)
        holds = held()
        return replace(row, **asdict(holds)) if holds else row

    @torch.no_grad()
    def nll(self, read: Read) -> float:
        """Mean negative log-likelihood of the texts past `nll_from`, in nats per token."""
        start, total = self.settings.nll_from, 0.0
        for ids in self.texts.split(self.settings.batch):  # type: ignore[no-untyped-call]
            for hidden, row in zip(read(ids)[:, start - 1 : -1], ids[:, start:], strict=True):
                for part, gold in zip(hidden.split(1024), row.to(hidden.device).split(1024), strict=True):
                    total += F.cross_entropy(self.head(part).float(), gold, reduction="sum").item()
        return total / (len(self.texts) * (self.texts.shape[1] - start))

    @torch.no_grad()
    def found(self, read: Read, length: int) -> list[bool]:
        """For each needle case of this length whether the greedy answer is exactly the needle."""
        cases, answers = self.needles[length]
        hits = []
        for ids, sizes in zip(cases.split(self.settings.batch), self._batches(answers), strict=True):  # type: ignore[no-untyped-call]
            for row, gold, n in zip(read(ids), ids, sizes, strict=True):
                # Greedy decoding gives the answer iff every answer token is the likeliest after those before it.
                best = self.head(row[-n - 1 : -1]).argmax(-1).cpu()
                hits.append(bool((best == gold[-n:]).all()))
        return hits

    @torch.no_grad()
    def kept(self, policy: Policy, length: int) -> float:
        """Mean slots per KV head that `policy` holds after `length` tokens."""
        held: list[float] = []

        class Count:
            window = policy.window
            gates = getattr(policy, "gates", None)

            def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
                keep = policy.log_keep(layer, hidden, key)
                stays = torch.isfinite(keep)
                stays[..., -policy.window :] = True  # what the next query sees of the recent ones
                held.append(stays.sum(-1).float().mean().item())
                return keep

        whole = length <= self.texts.shape[1]
        at_once(self.model, Count())(self.texts[:1, :length] if whole else _long(self.tokens[:length])[None])
        return _mean(held)

    @torch.no_grad()
    def held(self, parts: Parts) -> Held:
        """What a cache with pages in the model's dtype holds after the first text, read in the model's own chunks."""
        attach_parts(self.model, parts)
        cache = KVCache(self.model)
        self.model(input_ids=self.texts[:1].to(self.model.device), past_key_values=cache, logits_to_keep=1)
        attach(self.model)
        return Held.by(cache)

    def _batches(self, values: list[int]) -> list[list[int]]:
        return [values[i : i + self.settings.batch] for i in range(0, len(values), self.settings.batch)]


def _long(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int64))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
