"""Prompt lookup on the CPU: the demonstration's questions, answered with drafts and without, in alternating runs.

    python bench/drafts.py --dtype bf16 --runs 3 --out drafts.json

Prints a table and writes JSON with the commit, the hardware and the versions. Times are from the first new token to the
last; answers must be the same, token for token. Seconds of the processor are shown too, for where others use it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu import DTYPES, record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import StoppingCriteria

import octavo
from octavo.cli.demo import INSTRUCTION, QUESTIONS, TEXT


class Answer(NamedTuple):
    """One answer from its first token on: its ids, tokens after the first, forwards, seconds passed and computed."""

    ids: list[int]
    tokens: int
    steps: int
    wall_s: float
    cpu_s: float


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each forward's tokens are there; it never stops anything."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float, int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append((time.perf_counter(), time.process_time(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def answer(model: Any, tokenizer: Any, question: str, **options: Any) -> Answer:
    """A greedy answer to a question about the demonstration's text."""
    chat = [{"role": "user", "content": INSTRUCTION.format(text=TEXT.read_text(), question=question)}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    clock = Clock()
    out = model.generate(**given, max_new_tokens=48, do_sample=False, stopping_criteria=[clock], **options)
    first, last = clock.times[0], clock.times[-1]
    ids = out[0, given["input_ids"].shape[1] :].tolist()
    return Answer(ids, last[2] - first[2], len(clock.times) - 1, last[0] - first[0], last[1] - first[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--adapter", default="dms-8x")
    parser.add_argument("--drafted", type=int, default=10, help="Tokens that are drafted at once.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = octavo.load(adapter=args.adapter, dtype=DTYPES[args.dtype], device="cpu")
    rows: list[dict[str, Any]] = []
    for run in range(args.runs):
        for i, question in enumerate(QUESTIONS):
            plain = answer(model, tokenizer, question)
            drafted = answer(model, tokenizer, question, prompt_lookup_num_tokens=args.drafted)
            assert plain.ids == drafted.ids, f"answers differ: {tokenizer.decode(plain.ids)!r}"
            for name, each in (("plain", plain), ("prompt lookup", drafted)):
                rows.append({"run": run, "question": i, "with": name, **each._asdict(), "ids": len(each.ids)})
    _report(rows, args.out)


def _report(rows: list[dict[str, Any]], out: Path | None) -> None:
    table = Table("", "tokens", "forwards", "tokens/s", "tokens/s of processor time")
    rates: dict[str, tuple[float, float]] = {}
    for name in ("plain", "prompt lookup"):
        mine = [row for row in rows if row["with"] == name]
        tokens, steps, wall, cpu = (sum(row[key] for row in mine) for key in ("tokens", "steps", "wall_s", "cpu_s"))
        rates[name] = tokens / wall, tokens / cpu
        table.add_row(name, str(tokens), str(steps), *(f"{rate:.1f}" for rate in rates[name]))
    ratios = [b / a for a, b in zip(rates["plain"], rates["prompt lookup"], strict=True)]
    table.add_row("ratio", "", "", *(f"{ratio:.2f}x" for ratio in ratios))
    Console().print(table)
    print(json.dumps(record(out, rows=rows)))


if __name__ == "__main__":
    main()
