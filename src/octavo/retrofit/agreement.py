"""How far answers change: the base model's greedy answers to questions, against those of the model with adapters.

Two figures: the share of questions that end in the same number, where one early difference may change all that
follows; and the share of the base's own answer tokens that the other model would choose too, given the base's
tokens before, which is steadier. Answers come from the real cache, skipped layers and eviction included.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from octavo.attachment import attachment_of, require_attachment
from octavo.attachment.attach import attach, restore
from octavo.dms import HardGates
from octavo.errors import ConfigError, TextFileError
from octavo.retrofit.data import encode, numbered_lines
from octavo.retrofit.entries import DENSE, Entry, Parts, attach_parts, parts_of
from octavo.retrofit.readout import readout

# A minus after a digit or a bracket subtracts.
NUMBER = re.compile(r"(?:(?<![0-9)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class Question:
    """A question and its right answer, whose last number counts."""

    question: str
    answer: str


@dataclass(frozen=True)
class AgreementSettings:
    """The first `cases` questions, at most `max_new_tokens` of answer to each, `batch` at once."""

    cases: int = 200
    max_new_tokens: int = 256
    batch: int = 64

    def __post_init__(self) -> None:
        if min(self.cases, self.max_new_tokens, self.batch) < 1:
            raise ConfigError("cases, max_new_tokens and batch must be at least 1")


@dataclass(frozen=True)
class Answers:
    """One entry's shares: answers ending in the base's number (`same`, of the questions that the base answers with
    one; 0 where there are none) or in the right one (`right`, of all), and tokens of the base's answers that would
    be chosen again (`agreed`; for the base itself, what rounding leaves)."""

    name: str
    same: float
    right: float
    agreed: float


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` lines of a JSONL file with `question` and `answer`; blank ones are skipped.

    Raises TextFileError.
    """
    questions = [_question(line, where) for line, where in islice(numbered_lines(path), limit)]
    if not questions:
        raise TextFileError(f"{path} holds no questions")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
        return Question(str(record["question"]), str(record["answer"]))
    except (ValueError, KeyError, TypeError) as e:
        raise TextFileError(f"{where} holds no 'question' and 'answer'") from e


def last_number(text: str) -> Decimal | None:
    """The last number in a text, commas removed; None where there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def agreement(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    entries: Sequence[Entry],
    settings: AgreementSettings | None = None,
) -> list[Answers]:
    """Answers of the base model, first, and of the model with each entry's adapters. The model is left as found.

    Raises AdapterMismatchError, and ConfigError where there are no questions.
    """
    settings = settings or AgreementSettings()
    if not questions:
        raise ConfigError("agreement needs at least one question")
    before = attachment_of(model)
    asked = questions[: settings.cases]
    prompts = [prompt_ids(tokenizer, q.question) for q in asked]
    gold = [last_number(q.answer) for q in asked]
    rows: list[Answers] = []
    base: list[list[int]] = []
    try:
        attach(model)
        for parts in (DENSE, *(parts_of(entry, model) for entry in entries)):
            attach_parts(model, parts)
            answers = answered(model, prompts, settings)
            base = base or answers
            ends, expected = ([last_number(_text(tokenizer, ids)) for ids in each] for each in (answers, base))
            same = [a == b for a, b in zip(ends, expected, strict=True) if b is not None]
            right = [a is not None and a == b for a, b in zip(ends, gold, strict=True)]
            attach(model)
            agreed = _agreed(model, parts, prompts, base, settings.batch)
            rows.append(Answers(parts.name, sum(same) / max(1, len(same)), sum(right) / len(right), agreed))
    finally:
        restore(model, before)
    return rows


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """A question as the beginning of a chat that the model goes on with."""
    if tokenizer.chat_template is None:
        return encode(tokenizer, f"User: {question}\nAssistant:")
    messages = [{"role": "user", "content": question}]
    return encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def answered(model: PreTrainedModel, prompts: list[list[int]], settings: AgreementSettings) -> list[list[int]]:
    """Greedy answers of the attached model, each with the stop token that ended it, if one did."""
    stops = _stops(model)
    out: list[list[int]] = [[] for _ in prompts]
    for indices in _batches([len(p) for p in prompts], settings.batch):
        longest = max(len(prompts[i]) for i in indices)
        ids = torch.stack([F.pad(torch.tensor(prompts[i]), (longest - len(prompts[i]), 0)) for i in indices])
        sizes = torch.tensor([len(prompts[i]) for i in indices])
        mask = (torch.arange(longest) >= longest - sizes[:, None]).long()
        full = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
        for i, row in zip(indices, full[:, longest:].tolist(), strict=True):
            end = next((at + 1 for at, token in enumerate(row) if token in stops), len(row))
            out[i] = row[:end]
    return out


@torch.no_grad()
def _agreed(
    model: PreTrainedModel, parts: Parts, prompts: list[list[int]], answers: list[list[int]], batch: int
) -> float:
    """Share of the tokens of `answers` that are the likeliest after the prompt and the answer's tokens before.

    One forward without a cache per batch: the same function as the cache's, where all logits are at hand.
    """
    head = readout(model)
    hits = total = 0
    for indices in _batches([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], batch):
        rows = [prompts[i] + answers[i] for i in indices]
        longest = max(map(len, rows))
        # Padding lies after all that counts, where no token looks, so it needs no mask.
        ids = torch.stack([F.pad(torch.tensor(row), (0, longest - len(row))) for row in rows]).to(model.device)
        policy = HardGates(parts.gates) if parts.gates is not None else None
        with require_attachment(model).using(policy, transform=parts.transform):
            hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for b, i in enumerate(indices):
            first, size = len(prompts[i]), len(answers[i])
            best = head(hidden[b, first - 1 : first + size - 1]).argmax(-1)
            hits += int((best == ids[b, first : first + size]).sum())
            total += size
    return hits / total


def _batches(sizes: list[int], batch: int) -> list[list[int]]:
    """Indices in batches of like sizes, which pad least."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def _stops(model: PreTrainedModel) -> set[int]:
    stops = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return set(stops) if isinstance(stops, list) else set() if stops is None else {stops}


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


__all__ = ["AgreementSettings", "Answers", "Question", "agreement", "last_number", "read_questions"]
