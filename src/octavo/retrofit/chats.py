"""Chats in the model's own words: its sampled answers to a file of prompts, as JSONL for `load_source`.

Gates distilled on running text alone see no chat markers and none of the model's own style; a share of its own
answers covers both, without any labelled data.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from octavo.errors import TextFileError

PROMPT_KEYS = ("prompt", "question", "instruction", "text")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a JSONL file, one per line under `prompt`, `question`, `instruction` or `text`."""
    prompts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise TextFileError(f"cannot read {path}: {e}") from e
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            prompts.append(next(record[key] for key in PROMPT_KEYS if key in record))
        except (ValueError, StopIteration, TypeError) as e:
            raise TextFileError(f"{path}:{number} holds none of {', '.join(PROMPT_KEYS)}") from e
        if limit is not None and len(prompts) == limit:
            break
    return prompts


@torch.no_grad()
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
    """Answer every prompt (sampled, temperature 0.7) and write one {"messages": ...} line each."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together pad least
    with out.open("w", encoding="utf-8") as f:
        for first in range(0, len(order), batch):
            asked = [[{"role": "user", "content": prompts[i]}] for i in order[first : first + batch]]
            texts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
            ids = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.7, top_p=0.95
            )
            answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for chat, answer in zip(asked, answers, strict=True):
                messages = [*chat, {"role": "assistant", "content": answer.strip()}]
                f.write(json.dumps({"messages": messages}) + "\n")
            on_batch(min(first + batch, len(order)))
