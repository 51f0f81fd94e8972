"""The texts that the suite reads: prose, and where there are some, code, other texts and chats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import TextFileError
from octavo.retrofit.data import Source, check_text, load_source, read_documents

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class SuiteTexts:
    """What is read: all kept apart from training.

    `prose` also lies between what is asked for in most tasks. `code`: for the tasks on code, which are left out
    without it. `others`: more texts by name, for the NLL alone. `chats`: the model's own answers; sampled by the suite
    where None, left out where empty. `questions`: short prompts whose greedy answers are compared.
    """

    prose: Source
    code: Source | None = None
    others: dict[str, Source] = field(default_factory=dict)
    chats: Sequence[Messages] | None = None
    questions: Sequence[str] = ()


def read_suite_text(path: Path, tokenizer: Any, length: int) -> Source:
    """A text, JSONL or token file with at least `length` tokens of this tokenizer.

    Raises TextFileError where the file cannot be read, is no text, is too short or holds other tokens.
    """
    source = load_source(path, tokenizer, length)
    largest = int(np.max(source.tokens))
    if largest >= len(tokenizer):
        raise TextFileError(
            f"{path} holds token {largest:,}, but the tokenizer has {len(tokenizer):,}: another's tokens"
        )
    sample = tokenizer.decode(source.tokens[:4096].astype(np.int64), skip_special_tokens=True)
    check_text(sample, str(path))
    return source


def read_chats(path: Path) -> list[Messages]:
    """The chats of a JSONL file. Raises TextFileError where it has a line without `messages`, or none at all."""
    chats = []
    for document in read_documents(path):
        if isinstance(document, str):
            raise TextFileError(f"{path} holds text that is no chat; every line needs 'messages'")
        chats.append(document)
    if not chats:
        raise TextFileError(f"{path} holds no chats")
    return chats
