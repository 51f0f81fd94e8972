"""Chats in the model's own words: its sampled answers to a file of prompts, as JSONL for `load_source`.

Gates distilled on running text alone see no chat markers and none of the model's own style; a share of its own
answers covers both, without any labelled data.
"""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.errors import ConfigError, OutputFileError, TextFileError
from octavo.retrofit.data import encode, numbered_lines

PROMPT_KEYS = ("prompt", "question", "instruction", "text")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSONL file, one per line under `prompt`, `question`, `instruction` or `text`; the first `limit`.

    Raises TextFileError where a line has none or there are no lines, and ConfigError.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    prompts = [_prompt(line, where) for line, where in islice(numbered_lines(path), limit)]
    if not prompts:
        raise TextFileError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise TextFileError(f"{where} is not valid JSON: {e}") from e
    found = [record[key] for key in PROMPT_KEYS if key in record] if isinstance(record, dict) else []
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise TextFileError(f"{where} holds none of {', '.join(PROMPT_KEYS)} with a text")
    return found[0]


def write_chats(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[str],
    out: Path,
    *,
    batch: int = 64,
    max_new_tokens: int = 256,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Answer every prompt (sampled, temperature 0.7) and write one {"messages": ...} line each.

    Written aside, to `out`.new, and renamed at the end, so that an earlier file stays until then. Raises ConfigError
    and OutputFileError.
    """
    if not prompts or batch < 1 or max_new_tokens < 1:
        raise ConfigError("give at least one prompt; batch and max_new_tokens must be at least 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must lie in 0..2**63 - 1, not {seed}")
    torch.manual_seed(seed)
    aside = out.with_name(out.name + ".new")
    ordered = sorted(prompts, key=len)  # like lengths together pad least
    try:
        with aside.open("w", encoding="utf-8") as f:
            for first in range(0, len(ordered), batch):
                for messages in sampled_chats(model, tokenizer, ordered[first : first + batch], max_new_tokens):
                    f.write(json.dumps({"messages": messages}) + "\n")
                on_batch(min(first + batch, len(ordered)))
        aside.replace(out)
    except OSError as e:
        raise OutputFileError(f"cannot write {out}: {e.strerror or e}") from e


def sampled_chats(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], max_new_tokens: int, seed: int | None = None
) -> list[list[dict[str, str]]]:
    """One chat of two messages per prompt, answered at temperature 0.7; an answer may be empty.

    `seed`: of the sampling; None goes on from the generators as they are.
    """
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answers = _gone_on(model, tokenizer, [encode(tokenizer, text) for text in texts], max_new_tokens, seed)
    return [
        [*chat, {"role": "assistant", "content": answer.strip()}] for chat, answer in zip(asked, answers, strict=True)
    ]


def sampled_texts(
    model: PreTrainedModel, tokenizer: Any, openings: list[str], max_new_tokens: int, seed: int | None = None
) -> list[str]:
    """How the model goes on from each of `openings`, sampled as in `sampled_chats`; what it says may be empty."""
    begun = [tokenizer(opening, verbose=False)["input_ids"] for opening in openings]  # with a first token, if there is
    return _gone_on(model, tokenizer, begun, max_new_tokens, seed)


@torch.no_grad()
def _gone_on(
    model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, seed: int | None
) -> list[str]:
    """What comes after each prompt, special tokens left out; shorter than asked where the model has no positions."""
    if seed is not None:
        torch.manual_seed(seed)
    longest = max(map(len, prompts))
    positions = getattr(model.config, "max_position_embeddings", None) or longest + max_new_tokens
    if longest >= positions:
        raise ConfigError(f"a prompt has {longest} tokens, and the model {positions} positions: give shorter prompts")
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # the tokenizer need not have a token for padding
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    out = model.generate(  # type: ignore[operator]
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=pad,
        max_new_tokens=min(max_new_tokens, positions - longest), do_sample=True, temperature=0.7, top_p=0.95,
    )  # fmt: skip
    said: list[str] = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return said
