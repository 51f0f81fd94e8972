"""What eviction costs: NLL far into a text, needles found again, bytes held; for gates and for their rivals.

Every policy is measured in one forward without a cache, where what is forgotten is masked. For gates that is
the same function as eviction from the cache (the identity the tests hold to 1e-4); the bytes are measured on
a real cache that has read a whole text in chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import KVCache, attach, attachment_of, require_attachment, restore
from octavo.dms import Adapter, HardGates, Policy
from octavo.dms.adapter import check_fingerprint
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.data import encode
from octavo.support import fingerprint

CITIES = ("Paris", "Tokyo", "Lagos", "Lima", "Oslo", "Cairo")


@dataclass(frozen=True)
class EvaluationSettings:
    """`texts` pieces of `nll_length` tokens, scored past token `nll_from`; `cases` needles at each of `lengths`,
    cycling through `depths` (shares of the text before the needle). `batch` sequences at once."""

    nll_length: int = 8000
    nll_from: int = 1024
    texts: int = 4
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    cases: int = 20
    batch: int = 1
    seed: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.nll_from < self.nll_length or min(self.texts, self.cases, self.batch) < 1:
            raise ConfigError("nll_from must lie within nll_length; texts, cases and batch must be at least 1")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ConfigError("depths must lie in [0, 1]")
        if any(n < 256 for n in self.lengths):
            raise ConfigError("needle lengths must be at least 256 tokens")


@dataclass(frozen=True)
class Row:
    """One policy's results. `needle[length]` and `depth[length][i]` are shares of exact answers, over
    `cases` each; `kept` is mean slots per KV head after `nll_length` tokens."""

    policy: str
    nll: float
    needle: dict[int, float]
    depth: dict[int, list[float]]
    kept: float
    nbytes: int | None = None
    dense_nbytes: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """All rows, dense first, with the settings that made them."""

    model: str
    settings: EvaluationSettings
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: npt.NDArray[Any],
    adapters: Sequence[Adapter] = (),
    settings: EvaluationSettings | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Evaluation:
    """Measure the model dense, under each adapter, and under the training-free policies at the first adapter's bytes.

    `tokens` [n] is running text the adapters were not trained on. The model is left as it was found.
    Raises TextFileError for too short a text and AdapterMismatchError.
    """
    settings = settings or EvaluationSettings()
    longest = max(settings.nll_length, *settings.lengths) if settings.lengths else settings.nll_length
    if len(tokens) < longest:
        raise TextFileError(f"the text has {len(tokens):,} tokens; {longest:,} are needed")
    for each in adapters:
        check_fingerprint(each, fingerprint(model))
    before = attachment_of(model)
    out = Evaluation(Path(model.config._name_or_path).name, settings)
    bench = _Bench(model, tokenizer, tokens, settings)
    try:
        attach(model)
        plans: list[tuple[str, Callable[[int], Policy | None], Adapter | None]] = [("dense", lambda n: None, None)]
        plans += [(a.name, lambda n, a=a: HardGates(a.gates.to(model.device)), a) for a in adapters]  # type: ignore[misc]
        if adapters and settings.baselines:
            kept = {n: bench.kept(HardGates(adapters[0].gates.to(model.device)), n) for n in bench.lengths}
            plans += [(name, lambda n, k=kind: k(n, kept[n]), None) for name, kind in BASELINES.items()]  # type: ignore[misc]
        for name, policy, adapter in plans:
            row = bench.row(name, policy, adapter)
            out.rows.append(row)
            on_row(row)
    finally:
        restore(model, before)
    return out


class _Bench:
    """The texts and needles of one evaluation, equal for all policies."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, tokens: npt.NDArray[Any], settings: EvaluationSettings
    ) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        self.lengths = sorted({*settings.lengths, settings.nll_length})
        rng = np.random.default_rng(settings.seed)
        starts = np.linspace(0, len(tokens) - settings.nll_length, settings.texts).astype(int)
        self.texts = torch.stack([_long(tokens[s : s + settings.nll_length]) for s in starts])
        self.needles = {n: needle_cases(tokenizer, tokens, n, settings, rng) for n in settings.lengths}

    def row(self, name: str, policy: Callable[[int], Policy | None], adapter: Adapter | None) -> Row:
        s = self.settings
        nll = self.nll(policy(s.nll_length))
        found = {n: self.found(policy(n), n) for n in s.lengths}
        depth = {n: [_mean(hits[i :: len(s.depths)]) for i in range(len(s.depths))] for n, hits in found.items()}
        kept: float = s.nll_length
        nbytes = dense = None
        if adapter is not None or name == "dense":
            cache = self.held(adapter)
            kept, nbytes, dense = cache.kept.float().mean().item(), cache.nbytes, cache.dense_nbytes
        else:
            chosen = policy(s.nll_length)
            assert chosen is not None
            kept = self.kept(chosen, s.nll_length)
        return Row(name, nll, {n: _mean(hits) for n, hits in found.items()}, depth, kept, nbytes, dense)

    @torch.no_grad()
    def hidden(self, ids: Tensor, policy: Policy | None) -> Tensor:
        with require_attachment(self.model).using(policy):
            out: Tensor = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
        return out

    @torch.no_grad()
    def nll(self, policy: Policy | None) -> float:
        """Mean negative log-likelihood (nats per token) past `nll_from`."""
        head, start, total = self.model.get_output_embeddings(), self.settings.nll_from, 0.0  # type: ignore[no-untyped-call]
        for ids in self.texts.split(self.settings.batch):  # type: ignore[no-untyped-call]
            for hidden, row in zip(self.hidden(ids, policy)[:, start - 1 : -1], ids[:, start:], strict=True):
                for part, gold in zip(hidden.split(1024), row.to(hidden.device).split(1024), strict=True):
                    total += F.cross_entropy(head(part).float(), gold, reduction="sum").item()
        return total / (len(self.texts) * (self.texts.shape[1] - start))

    @torch.no_grad()
    def found(self, policy: Policy | None, length: int) -> list[bool]:
        """For each case whether the greedy answer is exactly the needle."""
        cases, answers = self.needles[length]
        head, hits = self.model.get_output_embeddings(), []  # type: ignore[no-untyped-call]
        groups = cases.split(self.settings.batch)  # type: ignore[no-untyped-call]
        for ids, size in zip(groups, _groups(answers, self.settings.batch), strict=True):
            hidden = self.hidden(ids, policy)
            for row, gold, n in zip(hidden, ids, size, strict=True):
                # Greedy decoding gives the answer iff every answer token is the likeliest after those before it.
                best = head(row[-n - 1 : -1]).argmax(-1).cpu()
                hits.append(bool((best == gold[-n:]).all()))
        return hits

    @torch.no_grad()
    def kept(self, policy: Policy, length: int) -> float:
        """Mean slots per KV head that `policy` holds after `length` tokens."""
        held: list[float] = []

        class Count:
            window = policy.window

            def log_keep(self, layer: int, hidden: Tensor, key: Tensor) -> Tensor:
                keep = policy.log_keep(layer, hidden, key)
                stays = torch.isfinite(keep)
                stays[..., -policy.window :] = True  # what the next query sees of the recent ones
                held.append(stays.sum(-1).float().mean().item())
                return keep

        self.hidden(
            self.texts[:1, :length] if length <= self.texts.shape[1] else _long(self.tokens[:length])[None], Count()
        )
        return _mean(held)

    @torch.no_grad()
    def held(self, adapter: Adapter | None) -> KVCache:
        """A real cache that has read the first text in chunks."""
        attach(self.model, adapter)
        cache = KVCache(self.model)
        self.model.base_model(input_ids=self.texts[:1].to(self.model.device), past_key_values=cache)
        attach(self.model)
        return cache


def needle_cases(
    tokenizer: Any, tokens: npt.NDArray[Any], length: int, settings: EvaluationSettings, rng: np.random.Generator
) -> tuple[Tensor, list[int]]:
    """`cases` chats of exactly `length` tokens with a seven-digit number hidden in running text.

    Returns ids [cases, length], which end with the answer, and the answer's length of each in tokens.
    """
    rows, answers = [], []
    for i in range(settings.cases):
        city, number = CITIES[i % len(CITIES)], str(rng.integers(1_000_000, 10_000_000))
        ask = f"What is the special magic number for {city} mentioned in the text?"
        mark = "\x00"
        user = f"Read the text and remember the magic number in it.\n{mark}\n{ask}"
        reply = f"The special magic number for {city} is "
        chat = chat_ids_around(tokenizer, user, reply, mark)
        needle = encode(tokenizer, f"\nThe special magic number for {city} is {number}. Remember it.\n")
        answer = encode(tokenizer, number)
        room = length - len(chat[0]) - len(chat[1]) - len(needle) - len(answer)
        if room < 1:
            raise ConfigError(f"a needle case does not fit into {length} tokens")
        start = int(rng.integers(0, len(tokens) - room + 1))
        hay = [int(t) for t in tokens[start : start + room]]
        place = int(room * settings.depths[i % len(settings.depths)])
        rows.append(_long(chat[0] + hay[:place] + needle + hay[place:] + chat[1] + answer))
        answers.append(len(answer))
    return torch.stack(rows), answers


def chat_ids_around(tokenizer: Any, user: str, reply: str, mark: str) -> tuple[list[int], list[int]]:
    """Token ids before and after `mark` in a chat that ends with the unfinished `reply`."""
    if tokenizer.chat_template is None:
        before, after = user.split(mark)
        return encode(tokenizer, before), encode(tokenizer, f"{after}\n{reply}")
    messages = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (text + reply).split(mark)
    return encode(tokenizer, before), encode(tokenizer, after)


def _long(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int64))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _groups(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


__all__ = ["Evaluation", "EvaluationSettings", "Row", "evaluate", "needle_cases"]
