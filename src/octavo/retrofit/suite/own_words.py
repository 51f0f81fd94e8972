"""Cases in the model's own words: conversations of its answers, and its greedy answers to what stands in a text."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from octavo.retrofit.agreement import AgreementSettings, answered, prompt_ids
from octavo.retrofit.chats import sampled_chats
from octavo.retrofit.data import encode
from octavo.retrofit.exercises.reader import Reader
from octavo.retrofit.prompts import made_prompts
from octavo.retrofit.recall import chat_frame
from octavo.retrofit.suite.cases import Asked, Case, CaseSet, Context, Ids, laid_out
from octavo.retrofit.suite.settings import LongSettings
from octavo.retrofit.suite.tasks import SEED
from octavo.retrofit.suite.texts import Messages, SuiteTexts

SAMPLED = 256  # tokens of a sampled answer at most
ANSWERED = 256  # tokens of the answer to a question
PER_CONTEXT = 4  # answers that the other tasks ask of a context, on average: as many contexts are read here
_ASKS = (
    "What is going on in this text? Answer in a few sentences.",
    "Who or what is this about, and what matters in it?",
    "Go on where the text ends.",
    "Put the most important points of this into a list.",
)


def own_chats(model: PreTrainedModel, tokenizer: Any, settings: LongSettings, batch: int = 64) -> list[Messages]:
    """As many sampled answers to made-up prompts as `settings.texts` conversations need, about."""
    needed = settings.texts * settings.nll_length // 160 + 1
    prompts = made_prompts(needed, SEED + settings.seed)
    chats: list[Messages] = []
    for first in range(0, len(prompts), batch):
        chats += sampled_chats(model, tokenizer, prompts[first : first + batch], SAMPLED, seed=SEED + first)
    return [chat for chat in chats if chat[-1]["content"]]


def conversations(tokenizer: Any, chats: Sequence[Messages], settings: LongSettings) -> CaseSet | None:
    """Conversations of whole chats, one after another, whose answers count past `nll_from`; None: too few of them."""
    opening, between, closing = chat_frame(tokenizer, "")
    cases: list[Case] = []
    ids: list[int] = list(opening)
    spans: list[tuple[int, int]] = []
    n = settings.nll_length
    for chat in chats:
        if len(cases) == settings.texts:
            break
        for question, answer in _turns(chat):
            ids += encode(tokenizer, question) + between
            said = encode(tokenizer, answer) + closing[:1]
            spans.append((len(ids), len(ids) + len(said)))
            ids += said + closing[1:]
        if len(ids) >= n:
            counted = [(max(a, settings.nll_from), min(b, n)) for a, b in spans]
            cases.append(Case(np.array(ids[:n]), [(a, b) for a, b in counted if a < b]))
            ids, spans = list(opening), []
    cases = [case for case in cases if case.spans]
    return CaseSet.of("chats", "nll", cases) if cases else None


def _turns(chat: Messages) -> Iterator[tuple[str, str]]:
    for before, message in pairwise(chat):
        if before["role"] == "user" and message["role"] == "assistant":
            yield before["content"], message["content"]


def greedy_sets(model: PreTrainedModel, tokenizer: Any, texts: SuiteTexts, settings: LongSettings) -> Iterator[CaseSet]:
    """The dense model's greedy answers about texts at every length, and to the questions. The model is attached.

    An answer counts as the same where every token of it is the likeliest after those before: greedy decoding then
    gives the same answer.
    """
    sources = [source for source in (texts.prose, texts.code) if source is not None]
    for length in settings.lengths:
        rng = np.random.default_rng((SEED, settings.seed, 100, length))
        prompts = []
        for i in range(max(1, settings.cases // PER_CONTEXT)):
            reader = Reader(tokenizer, [sources[i % len(sources)]])
            context = Context([], [Asked(_ASKS[int(rng.integers(len(_ASKS)))], "", ())])
            case = laid_out(tokenizer, context, partial(reader.running, rng), length - settings.answer)
            prompts.append([int(token) for token in case.ids])
        yield _greedy("greedy answers", model, tokenizer, prompts, settings, settings.answer, length)
    if texts.questions:
        prompts = [prompt_ids(tokenizer, question) for question in texts.questions]
        yield _greedy("greedy, questions", model, tokenizer, prompts, settings, ANSWERED, None)


def _greedy(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: LongSettings,
    most: int,
    length: int | None,
) -> CaseSet:
    """Prompts with the greedy answers to them, filled up to `length` or to the longest after what counts."""
    longest = max(map(len, prompts))
    batch = max(1, settings.batch_tokens // (longest + most))
    answers = answered(model, prompts, AgreementSettings(len(prompts), most, batch))
    size = length or max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    fill = tokenizer.eos_token_id or 0
    cases = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids: Ids = np.full(size, fill, dtype=np.int64)
        ids[: len(prompt) + len(answer)] = prompt + answer
        cases.append(Case(ids, [(len(prompt), len(prompt) + len(answer))]))
    return CaseSet.of(name, "same", cases)
