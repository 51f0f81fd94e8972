"""Runs the suite: the model dense, under each of the adapters, and under the training-free policies, on one set of
cases."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.attachment import KVCache, attachment_of
from octavo.attachment.attach import attach, restore
from octavo.dms import HardGates, Policy
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.entries import DENSE, Entry, Parts, attach_parts, named, parts_of
from octavo.retrofit.measuring import Held
from octavo.retrofit.readout import readout
from octavo.retrofit.suite.cases import CaseSet
from octavo.retrofit.suite.own_words import conversations, greedy_sets, own_chats
from octavo.retrofit.suite.results import LongEvaluation, PolicyResult, SetResult
from octavo.retrofit.suite.scoring import Scores, score
from octavo.retrofit.suite.settings import SMALLEST, LongSettings
from octavo.retrofit.suite.tasks import task_sets, text_sets
from octavo.retrofit.suite.texts import SuiteTexts

STRANGE = 5.0  # nats per token past which a model hardly knows a text
UNSOLVED = 0.1  # share of exact answers below which a row says little
Said = Callable[[str], None]


def evaluate_long(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: SuiteTexts,
    adapters: Sequence[Entry] | Mapping[str, Entry] = (),
    settings: LongSettings | None = None,
    on_progress: Said = lambda what: None,
    on_policy: Callable[[LongEvaluation], None] = lambda so_far: None,
) -> LongEvaluation:
    """Measure the model dense, under each of `adapters`, and under the training-free policies at the same slots.

    `adapters`: gates, SwiftKV adapters, and (SwiftKV adapter, its gates), by name where their own will not do. The
    rivals (sinks and recent tokens, key norm, random) hold in every set of cases as many slots as plain gates do
    there: the first of `adapters` that are, or all where `settings.every_budget`. `on_progress` hears what is being
    done, `on_policy` gets what there is after every policy. The model is left as it was found.

    Raises TextFileError for too short a text, ConfigError for lengths that the model has no positions for or that a
    case does not fit into, AdapterMismatchError, and UnsupportedModelError where the model cannot be attached.
    """
    settings = settings or LongSettings()
    _check(model, texts, settings)
    before = attachment_of(model)
    try:
        by_name = adapters if isinstance(adapters, Mapping) else named([(None, entry) for entry in adapters])
        entries = [replace(parts_of(entry, model), name=name) for name, entry in by_name.items()]
        for parts in entries:
            attach_parts(model, parts)  # refuses what does not fit before the work begins
        attach(model)
        out = LongEvaluation(Path(model.config._name_or_path).name, settings)
        cases = list(_cases(model, tokenizer, texts, settings, out.notes, on_progress))
        bench = _Bench(model, texts, settings, cases, on_progress)
        for parts in (DENSE, *entries):
            out.policies.append(bench.entry(parts))
            if len(out.policies) == 1:
                _say_of_dense(out)
            on_policy(out)
        for parts, found in _budgets(entries, out.policies[1:], settings):
            for name, kind in BASELINES.items():
                out.policies.append(bench.rival(name, kind, parts.name, found, settings.every_budget))
                on_policy(out)
    finally:
        restore(model, before)
    return out


def _check(model: PreTrainedModel, texts: SuiteTexts, settings: LongSettings) -> None:
    """Raise now what would end the work after minutes."""
    longest, limit = settings.longest, getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        advice = f"give lengths (--lengths), nll_length (--nll-length) and held_at of at most {limit:,}"
        if limit < SMALLEST:
            advice = f"its tasks need contexts of {SMALLEST:,} at least, so this model cannot be given it"
        raise ConfigError(f"the model has {limit:,} positions and the suite asks for {longest:,}: {advice}")
    for source in (texts.prose, texts.code, *texts.others.values()):
        if source is not None and len(source.tokens) < longest:
            raise TextFileError(f"{source.name} has {len(source.tokens):,} tokens; {longest:,} are needed")


def _cases(
    model: PreTrainedModel, tokenizer: Any, texts: SuiteTexts, settings: LongSettings, notes: list[str], say: Said
) -> Iterator[CaseSet]:
    """All sets, and what is missing among them in `notes`. The model is attached, with no adapters."""
    yield from text_sets(texts, settings)
    if texts.code is None:
        notes.append("no code was given: code, repeat code and edit are left out")
    if tokenizer.chat_template is None:
        notes.append("the tokenizer has no chat template: tasks are plain text, chats are left out")
    elif texts.chats is None or texts.chats:
        say("sampling chats" if texts.chats is None else "reading chats")
        chats = own_chats(model, tokenizer, settings) if texts.chats is None else texts.chats
        made = conversations(tokenizer, chats, settings)
        if made is None:
            notes.append("the chats are too short for one conversation, or the model answers nothing: left out")
        else:
            yield made
    yield from task_sets(tokenizer, texts, settings)
    say("greedy answers of the dense model")
    yield from greedy_sets(model, tokenizer, texts, settings)


def _budgets(
    entries: Sequence[Parts], measured: Sequence[PolicyResult], settings: LongSettings
) -> list[tuple[Parts, PolicyResult]]:
    """The plain gates whose slots the rivals hold, with what was measured of them."""
    gates = [(p, r) for p, r in zip(entries, measured, strict=True) if p.gates is not None and p.transform is None]
    if not settings.baselines:
        return []
    return gates if settings.every_budget else gates[:1]


class _Bench:
    """One set of cases, read under one policy after another. The model is attached, with no adapters."""

    def __init__(
        self, model: PreTrainedModel, texts: SuiteTexts, settings: LongSettings, cases: list[CaseSet], say: Said
    ) -> None:
        self.model, self.settings, self.cases, self.say = model, settings, cases, say
        self.head = readout(model)
        first = texts.prose.tokens[: settings.held_at].astype("int64")
        self.read = torch.from_numpy(first)[None]

    def entry(self, parts: Parts) -> PolicyResult:
        """The dense model or an entry's adapters."""
        start = time.perf_counter()
        held = self._held(parts)
        policy = None if parts.gates is None else HardGates(parts.gates)
        sets = [self._set(parts.name, each, policy, parts) for each in self.cases]
        seconds = time.perf_counter() - start
        return PolicyResult(parts.name, parts.skipped, held.kept, held.nbytes, held.dense_nbytes, None, seconds, sets)

    def rival(
        self, name: str, kind: Callable[[int, float], Policy], gates: str, found: PolicyResult, named: bool
    ) -> PolicyResult:
        """A training-free policy with as many slots as the gates had in every set."""
        start = time.perf_counter()
        name = f"{name} as {gates}" if named else name
        sets = []
        for each, theirs in zip(self.cases, found.sets, strict=True):
            assert theirs.kept is not None
            made = self._set(name, each, kind(each.length, theirs.kept), DENSE, theirs.kept)
            sets.append(made)
        seconds = time.perf_counter() - start
        return PolicyResult(name, None, found.kept, found.nbytes, found.dense_nbytes, gates, seconds, sets)

    def _set(
        self, name: str, cases: CaseSet, policy: Policy | None, parts: Parts, kept: float | None = None
    ) -> SetResult:
        self.say(f"{name}: {cases.name} {cases.length:,}")
        scores = score(self.model, self.head, policy, parts.transform, cases, self.settings.batch_tokens)
        return summed(cases, scores, scores.kept if kept is None else kept)

    @torch.no_grad()
    def _held(self, parts: Parts) -> Held:
        """What a real cache holds of the prose, with pages in the model's dtype."""
        attach_parts(self.model, parts)
        cache = KVCache(self.model)
        self.model(input_ids=self.read.to(self.model.device), past_key_values=cache, logits_to_keep=1)
        attach(self.model)
        return Held.by(cache)


def summed(cases: CaseSet, scores: Scores, kept: float | None) -> SetResult:
    counted = sum(scores.counted)
    nll = sum(a * n for a, n in zip(scores.nll, scores.counted, strict=True)) / counted
    hits = [sum(case) for case in scores.exact]
    answers = sum(len(case) for case in scores.exact)
    return SetResult(
        cases.name, cases.length, cases.metric, len(cases.ids), answers, nll, sum(hits) / answers,
        sum(scores.likeliest) / counted, kept, scores.nll, hits,
    )  # fmt: skip


def _say_of_dense(out: LongEvaluation) -> None:
    """Note the rows that the dense model itself does badly, where a comparison says little."""
    for each in out.policies[0].sets:
        if each.metric == "nll" and each.nll > STRANGE:
            out.notes.append(
                f"{each.name}: the dense model has {each.nll:.1f} nats per token, so this text is of a language or "
                "kind that it hardly knows"
            )
        if each.metric == "exact" and each.exact < UNSOLVED:
            out.notes.append(f"{each.name} {each.length:,}: the dense model itself solves {each.exact:.0%}")


__all__ = ["evaluate_long"]
