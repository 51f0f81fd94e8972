"""What adapters cost: NLL far into a text, needles found again, bytes held. Measured are gates, SwiftKV transforms,
gates on transforms, and the training-free policies that compete with gates.

By default every row is measured in one forward without a cache, where what is forgotten is masked and every layer runs.
That is the same function as eviction from a cache and skipped layers (the tests compare them to 1e-4); the bytes are
those of a real cache that has read a whole text in chunks. With `EvaluationSettings.kv_dtype` every row is measured on
real caches, since a forward without a cache does not see how pages are stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
from transformers import PreTrainedModel

from octavo.attachment import attachment_of, require_attachment
from octavo.attachment.attach import attach, restore
from octavo.dms import HardGates, Policy
from octavo.errors import ConfigError, PromptError, TextFileError, UnsupportedModelError
from octavo.retrofit.agreement import Question, agreement, prompt_ids
from octavo.retrofit.baselines import BASELINES
from octavo.retrofit.entries import DENSE, Entry, Parts, attach_parts, parts_of
from octavo.retrofit.measuring import Bench
from octavo.retrofit.results import Evaluation, EvaluationSettings, Row


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
    where the first is plain gates and `settings.kv_dtype` is None. `tokens` [n] is running text that the adapters were
    not trained on; answers to `questions`, if any, are compared with the dense model's. `on_row` hears of each row as
    soon as it is measured. The model is left as it was found.

    Raises TextFileError for too short a text, ConfigError and PromptError for lengths and questions that the model
    has no positions for, ConfigError for questions together with `kv_dtype`, UnsupportedModelError where `kv_dtype`
    cannot be measured, and AdapterMismatchError.
    """
    settings = settings or EvaluationSettings()
    questions = questions[: settings.answers.cases]
    _check_lengths(model, tokenizer, len(tokens), settings, questions)
    if questions and settings.kv_dtype is not None:
        raise ConfigError("answers are compared on pages in the model's dtype only; give questions or kv_dtype")
    # More would overlap: one long text, counted several times.
    settings = replace(settings, texts=min(settings.texts, len(tokens) // settings.nll_length))
    before = attachment_of(model)
    out = Evaluation(Path(model.config._name_or_path).name, settings, questions=len(questions))
    bench = Bench(model, tokenizer, tokens, settings)

    def add(row: Row) -> None:
        out.rows.append(row)
        on_row(row)

    try:
        entries = [parts_of(entry, model) for entry in adapters]
        for parts in entries:
            attach_parts(model, parts)  # refuses what does not fit before the work begins
        attach(model)
        _check_chunks(model, settings)
        rivals = _rivals(bench, entries)
        for parts in (DENSE, *entries):
            for row in bench.rows(parts):
                add(row)
        for name, policy in rivals.items():
            add(bench.rival(name, policy))
        if questions:
            for i, each in enumerate(agreement(model, tokenizer, questions, adapters, settings.answers)):
                out.rows[i] = replace(out.rows[i], same=each.same, right=each.right, agreed=each.agreed)
    finally:
        restore(model, before)
    return out


def _check_chunks(model: PreTrainedModel, settings: EvaluationSettings) -> None:
    """Raise UnsupportedModelError where a text cannot be read in chunks, since then no token reads quantised pages."""
    if settings.kv_dtype is not None and require_attachment(model).needs_whole:
        raise UnsupportedModelError(
            f"the RoPE of {type(model).__name__} depends on the text's length, so a text is read in one chunk, which "
            "sees no quantised pages; leave kv_dtype out"
        )


def _rivals(bench: Bench, entries: Sequence[Parts]) -> dict[str, Callable[[int], Policy]]:
    """The training-free policies by name, each made for a length, that hold as many slots as the first gates."""
    gates = entries[0].gates if entries and entries[0].transform is None else None
    if gates is None or not bench.settings.baselines or bench.settings.kv_dtype is not None:
        return {}
    kept = {n: bench.kept(HardGates(gates), n) for n in bench.lengths}
    return {name: partial(_at, kind, kept) for name, kind in BASELINES.items()}


def _at(kind: Callable[[int, float], Policy], kept: dict[int, float], length: int) -> Policy:
    return kind(length, kept[length])


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
