"""Prefill and decode on the CPU, attached against unattached, in alternating runs.

    python bench/cpu.py --tokens 8000 --dtype bf16 --runs 5 --out cpu.json

Prints a table and writes JSON with the commit, the hardware and the versions. The unattached model runs with
transformers' `DynamicCache` and SDPA on the same text and feeds the same tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import octavo
from octavo.attachment.adapters import load_adapter
from octavo.bench.source import surroundings
from octavo.cli.demo import TEXT
from octavo.models import load_plain
from octavo.retrofit.data import read_text

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def one_run(model: Any, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """(prefill seconds, median seconds per decoded token)."""
    began = time.perf_counter()
    out = model(input_ids=ids, logits_to_keep=1)
    prefill = time.perf_counter() - began
    cache, token, times = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    for _ in range(steps):
        began = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache)
        token = out.logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - began)
    return prefill, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8000])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--adapter", default="dms-8x")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        model, tokenizer = load_plain(dtype=DTYPES[dtype], device="cpu")
        stream = tokenizer(read_text(args.text), return_tensors="pt", verbose=False)["input_ids"]
        stream = stream.repeat(1, -(-max(args.tokens) // stream.shape[1]))
        adapter = load_adapter(args.adapter)
        for tokens in args.tokens:
            ids = stream[:, :tokens]
            plain, ours = [], []
            for i in range(args.runs + 1):
                pair = one_run(model, ids, args.steps)
                octavo.attach(model, adapter)
                other = one_run(model, ids, args.steps)
                octavo.detach(model)
                if i:  # the first pair warms up
                    plain.append(pair)
                    ours.append(other)
            rows.append(_row(dtype, tokens, plain, ours))
            print(rows[-1], file=sys.stderr)
    _report(rows, args.out)


def _row(dtype: str, tokens: int, plain: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"dtype": dtype, "tokens": tokens}
    for i, phase in enumerate(("prefill", "decode")):
        before, after = [p[i] for p in plain], [o[i] for o in ours]
        ratios = [b / a for b, a in zip(before, after, strict=True)]
        row[phase] = {
            "unattached_s": statistics.median(before),
            "octavo_s": statistics.median(after),
            "speedup_median": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
        }
    return row


def _report(rows: list[dict[str, Any]], out: Path | None) -> None:
    table = Table("dtype", "tokens", "phase", "unattached", "octavo", "speed-up (min to max)")
    for row in rows:
        for phase in ("prefill", "decode"):
            r = row[phase]
            spread = f"{r['speedup_median']:.2f}x ({r['speedup_min']:.2f} to {r['speedup_max']:.2f})"
            scale, unit = (1, "s") if phase == "prefill" else (1000, "ms/token")
            before, after = (f"{r[k] * scale:.2f} {unit}" for k in ("unattached_s", "octavo_s"))
            table.add_row(row["dtype"], f"{row['tokens']:,}", phase, before, after, spread)
    Console().print(table)
    print(json.dumps(record(out, rows=rows)))


def record(out: Path | None, **measured: Any) -> dict[str, Any]:
    """What was measured, with the commit, the hardware, the versions and the command line; written to `out`."""
    whole = {**surroundings(), **measured}
    if out is not None:
        out.write_text(json.dumps(whole, indent=2) + "\n")
    return whole


if __name__ == "__main__":
    main()
