"""Needle cases: chats about a long text with a number hidden in it, which ends with that number as the answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.retrofit.data import encode

CITIES = ("Paris", "Tokyo", "Lagos", "Lima", "Oslo", "Cairo")
MARK = "\x00"  # stands for the text while the chat around it is made


def needle_cases(
    tokenizer: Any, tokens: npt.NDArray[Any], length: int, count: int, depths: Sequence[float], rng: np.random.Generator
) -> tuple[Tensor, list[int]]:
    """`count` chats of exactly `length` tokens with a seven-digit number hidden in a piece of `tokens` [n].

    `depths` are cycled through: shares of the piece before the number. Returns ids [count, length] int64, which end
    with the answer, and the answer's length of each in tokens. Raises ConfigError where `length` has no room.
    """
    rows, answers = [], []
    for i in range(count):
        city, number = CITIES[i % len(CITIES)], str(rng.integers(1_000_000, 10_000_000))
        ask = f"What is the special magic number for {city} mentioned in the text?"
        user = f"Read the text and remember the magic number in it.\n{MARK}\n{ask}"
        before, after = _around(tokenizer, user, f"The special magic number for {city} is ")
        needle = encode(tokenizer, f"\nThe special magic number for {city} is {number}. Remember it.\n")
        answer = encode(tokenizer, number)
        room = length - len(before) - len(after) - len(needle) - len(answer)
        if room < 1:
            raise ConfigError(f"a needle case does not fit into {length} tokens")
        start = int(rng.integers(0, len(tokens) - room + 1))
        hay = [int(t) for t in tokens[start : start + room]]
        place = int(room * depths[i % len(depths)])
        rows.append(torch.tensor(before + hay[:place] + needle + hay[place:] + after + answer))
        answers.append(len(answer))
    return torch.stack(rows), answers


def _around(tokenizer: Any, user: str, reply: str) -> tuple[list[int], list[int]]:
    """Token ids before and after `MARK` in a chat of the message `user` and the unfinished `reply`."""
    if tokenizer.chat_template is None:
        before, after = user.split(MARK)
        return encode(tokenizer, before), encode(tokenizer, f"{after}\n{reply}")
    messages = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (text + reply).split(MARK)
    return encode(tokenizer, before), encode(tokenizer, after)
