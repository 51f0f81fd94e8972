"""What adapters cost: NLL far into a text, needles found again, bytes held; for gates, for the training-free
policies that are their rivals, for SwiftKV transforms and for gates on these.

Every line is measured in one forward without a cache, where what is forgotten is masked and every layer runs.
That is the same function as eviction from the cache and skipped layers (identities the tests hold to 1e-4);
the bytes are measured on a real cache that has read a whole text in chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import KVCache, attachment_of, require_attachment
from octavo.attachment.attach import attach, restore
from octavo.dms import HardGates, Policy
from octavo.errors import ConfigError, PromptError, TextFileError
from octavo.retrofit.agreement import AgreementSettings, Question, agreement, prompt_ids
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.data import encode
from octavo.retrofit.entries import DENSE, Entry, Parts, attach_parts, parts_of
from octavo.swiftkv import SwiftKV, SwiftKVAdapter

CITIES = ("Paris", "Tokyo", "Lagos", "Lima", "Oslo", "Cairo")


@dataclass(frozen=True)
class EvaluationSettings:
    """At most `texts` pieces of `nll_length` tokens, scored past token `nll_from`; `cases` needles at each of
    `lengths` (repeats are dropped), cycling through `depths` (shares of the text before the needle). `batch`
    sequences at once."""

    nll_length: int = 8000
    nll_from: int = 1024
    texts: int = 4
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    cases: int = 20
    batch: int = 1
    seed: int = 0
    baselines: bool = True
    answers: AgreementSettings = field(default_factory=AgreementSettings)

    def __post_init__(self) -> None:
        if not 1 <= self.nll_from < self.nll_length or min(self.texts, self.cases, self.batch) < 1:
            raise ConfigError("nll_from must lie within nll_length; texts, cases and batch must be at least 1")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ConfigError("depths must lie in [0, 1]")
        if any(n < 256 for n in self.lengths):
            raise ConfigError("needle lengths must be at least 256 tokens")
        object.__setattr__(self, "lengths", tuple(dict.fromkeys(self.lengths)))


@dataclass(frozen=True)
class Row:
    """One line's results. `needle[length]` and `depth[length][i]` are shares of exact answers, over
    `cases` each; `kept` is mean slots per KV head after `nll_length` tokens. `skipped` is the share of layers
    that prompt tokens skip, None without SwiftKV; `same`, `right` and `agreed` are `agreement.Answers`, None
    where no questions were asked."""

    policy: str
    nll: float
    needle: dict[int, float]
    depth: dict[int, list[float]]
    kept: float
    nbytes: int | None = None
    dense_nbytes: int | None = None
    skipped: float | None = None
    same: float | None = None
    right: float | None = None
    agreed: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All rows, dense first, with the settings that made them (`texts` is how many the text had room for) and the
    number of questions asked."""

    model: str
    settings: EvaluationSettings
    rows: list[Row] = field(default_factory=list)
    questions: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: npt.NDArray[Any],
    adapters: Sequence[Entry] = (),
    settings: EvaluationSettings | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    questions: Sequence[Question] = (),
) -> Evaluation:
    """Measure the model dense, under each of `adapters`, and under the training-free policies at the first's bytes.

    `adapters`: gates, SwiftKV adapters, and (SwiftKV adapter, its gates). The training-free policies are measured
    where the first is plain gates. `tokens` [n] is running text that the adapters were not trained on; answers to
    `questions`, if any, are compared with the dense model's. The model is left as it was found.

    Raises TextFileError for too short a text, ConfigError and PromptError for lengths and questions that the model
    has no positions for, and AdapterMismatchError.
    """
    settings = settings or EvaluationSettings()
    questions = questions[: settings.answers.cases]
    _check_lengths(model, tokenizer, len(tokens), settings, questions)
    # More would overlap: one long text, counted several times.
    settings = replace(settings, texts=min(settings.texts, len(tokens) // settings.nll_length))
    before, asked = attachment_of(model), len(questions)
    out = Evaluation(Path(model.config._name_or_path).name, settings, questions=asked)
    bench = _Bench(model, tokenizer, tokens, settings)
    try:
        entries = [parts_of(entry, model) for entry in adapters]
        for parts in entries:
            attach_parts(model, parts)  # what does not fit is refused before the work, not after
        attach(model)
        rivals = {}
        gates = entries[0].gates if entries and entries[0].swiftkv is None else None
        if gates is not None and settings.baselines:
            kept = {n: bench.kept(HardGates(gates), n) for n in bench.lengths}
            rivals = {name: lambda n, k=kind: k(n, kept[n]) for name, kind in BASELINES.items()}
        for parts in (DENSE, *entries):
            out.rows.append(bench.row(parts))
            on_row(out.rows[-1])
        for name, policy in rivals.items():
            out.rows.append(bench.rival(name, policy))
            on_row(out.rows[-1])
        if questions:
            for i, each in enumerate(agreement(model, tokenizer, questions, adapters, settings.answers)):
                out.rows[i] = replace(out.rows[i], same=each.same, right=each.right, agreed=each.agreed)
    finally:
        restore(model, before)
    return out


def _check_lengths(
    model: PreTrainedModel, tokenizer: Any, size: int, settings: EvaluationSettings, questions: Sequence[Question]
) -> None:
    """Raise now what would end the work after minutes: too few tokens of text, or positions of the model."""
    longest = max((settings.nll_length, *settings.lengths))
    if size < longest:
        raise TextFileError(f"the text has {size:,} tokens; {longest:,} are needed")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    if longest > limit:
        raise ConfigError(
            f"the model has {limit:,} positions; nll_length and lengths must not exceed that: {longest:,}"
        )
    for number, question in enumerate(questions, 1):
        tokens = len(prompt_ids(tokenizer, question.question))
        if tokens > limit:
            raise PromptError(f"question {number} has {tokens:,} tokens, the model has {limit:,} positions; shorten it")


def cells(lengths: Sequence[int], rows: Sequence[Row]) -> list[list[str]]:
    """A table of an evaluation, its header first: needles at `lengths`; columns that no row fills are left out."""
    dense = rows[0]

    def held(row: Row) -> str:
        if row.nbytes is None or row.dense_nbytes is None:
            return ""
        return f"{row.nbytes:,} (1/{row.dense_nbytes / row.nbytes:.2f})"

    needles = [{int(n): f"{share:.3f}" for n, share in row.needle.items()} for row in rows]  # JSON's keys are strings
    columns = [
        ["policy", *(row.policy for row in rows)],
        ["layers skipped", *(_percent(row.skipped) for row in rows)],
        ["NLL", *(f"{row.nll:.4f}" for row in rows)],
        ["to dense", *(f"{row.nll - dense.nll:+.4f}" for row in rows)],
        *([f"needle {n:,}", *(found.get(n, "") for found in needles)] for n in lengths),
        ["same answers", *(_percent(row.same) for row in rows)],
        ["right answers", *(_percent(row.right) for row in rows)],
        ["same tokens", *(_percent(row.agreed) for row in rows)],
        ["slots kept", *(f"{row.kept:,.0f}" for row in rows)],
        ["bytes held", *(held(row) for row in rows)],
    ]
    return [list(line) for line in zip(*(c for c in columns if any(c[1:])), strict=True)]


def skip_points(result: Evaluation, adapters: Sequence[Entry]) -> list[tuple[float, float, str]]:
    """What `plots.skip_curve` draws: (share skipped, NLL to dense, name) of each SwiftKV adapter without gates."""
    dense, *rows = result.rows
    return [
        (row.skipped, row.nll - dense.nll, row.policy)
        for row, entry in zip(rows, adapters, strict=False)
        if isinstance(entry, SwiftKVAdapter) and row.skipped is not None
    ]


class _Bench:
    """The texts and needles of one evaluation, equal for all lines."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, tokens: npt.NDArray[Any], settings: EvaluationSettings
    ) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        self.lengths = sorted({*settings.lengths, settings.nll_length})
        rng = np.random.default_rng(settings.seed)
        starts = np.linspace(0, len(tokens) - settings.nll_length, settings.texts).astype(int)
        self.texts = torch.stack([_long(tokens[s : s + settings.nll_length]) for s in starts])
        self.needles = {n: needle_cases(tokenizer, tokens, n, settings, rng) for n in settings.lengths}

    def row(self, parts: Parts) -> Row:
        """The model dense or with adapters."""
        row = self._row(parts.name, lambda n: _policy(parts), parts.swiftkv)
        cache = self.held(parts)
        kept = cache.kept.float().mean().item()
        return replace(row, kept=kept, nbytes=cache.nbytes, dense_nbytes=cache.dense_nbytes, skipped=parts.skipped)

    def rival(self, name: str, policy: Callable[[int], Policy]) -> Row:
        """A training-free policy, made for each length."""
        length = self.settings.nll_length
        return replace(self._row(name, policy), kept=self.kept(policy(length), length))

    def _row(self, name: str, policy: Callable[[int], Policy | None], swiftkv: SwiftKV | None = None) -> Row:
        s = self.settings
        nll = self.nll(policy(s.nll_length), swiftkv)
        found = {n: self.found(policy(n), n, swiftkv) for n in s.lengths}
        depth = {n: [_mean(hits[i :: len(s.depths)]) for i in range(len(s.depths))] for n, hits in found.items()}
        return Row(name, nll, {n: _mean(hits) for n, hits in found.items()}, depth, s.nll_length)

    @torch.no_grad()
    def hidden(self, ids: Tensor, policy: Policy | None, swiftkv: SwiftKV | None = None) -> Tensor:
        with require_attachment(self.model).using(policy, swiftkv=swiftkv):
            out: Tensor = self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
        return out

    @torch.no_grad()
    def nll(self, policy: Policy | None, swiftkv: SwiftKV | None = None) -> float:
        """Mean negative log-likelihood (nats per token) past `nll_from`."""
        head, start, total = self.model.get_output_embeddings(), self.settings.nll_from, 0.0  # type: ignore[no-untyped-call]
        for ids in self.texts.split(self.settings.batch):  # type: ignore[no-untyped-call]
            for hidden, row in zip(self.hidden(ids, policy, swiftkv)[:, start - 1 : -1], ids[:, start:], strict=True):
                for part, gold in zip(hidden.split(1024), row.to(hidden.device).split(1024), strict=True):
                    total += F.cross_entropy(head(part).float(), gold, reduction="sum").item()
        return total / (len(self.texts) * (self.texts.shape[1] - start))

    @torch.no_grad()
    def found(self, policy: Policy | None, length: int, swiftkv: SwiftKV | None = None) -> list[bool]:
        """For each case whether the greedy answer is exactly the needle."""
        cases, answers = self.needles[length]
        head, hits = self.model.get_output_embeddings(), []  # type: ignore[no-untyped-call]
        groups = cases.split(self.settings.batch)  # type: ignore[no-untyped-call]
        for ids, size in zip(groups, _groups(answers, self.settings.batch), strict=True):
            hidden = self.hidden(ids, policy, swiftkv)
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
    def held(self, parts: Parts) -> KVCache:
        """A real cache that has read the first text in chunks."""
        attach_parts(self.model, parts)
        cache = KVCache(self.model)
        self.model(input_ids=self.texts[:1].to(self.model.device), past_key_values=cache, logits_to_keep=1)
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


def _policy(parts: Parts) -> HardGates | None:
    return None if parts.gates is None else HardGates(parts.gates)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _long(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values).astype(np.int64))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _groups(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


__all__ = ["Evaluation", "EvaluationSettings", "Row", "cells", "evaluate", "needle_cases", "skip_points"]
