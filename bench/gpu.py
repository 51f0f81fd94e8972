"""Prefill and decode on a GPU, attached against unattached, models taking turns.

    python bench/gpu.py --tokens 500 8000 --batch 1 8 --out bench/results-gpu.json

Prints a table and writes JSON with the commit, the hardware and the versions. Each round runs every model once on the
same text, and a ratio is the median of the rounds' ratios, since the host's speed changes from minute to minute. The
unattached model runs with transformers' `DynamicCache` and SDPA. Every model is a copy of its own.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cpu import record
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import octavo
from octavo.attachment.adapters import load_adapter
from octavo.attachment.prompt_graphs import OFTEN
from octavo.cli.demo import TEXT
from octavo.models import load_plain
from octavo.retrofit.data import read_text

PLAIN = "unattached"
WARM = OFTEN  # rounds in which kernels are compiled and graphs are captured


def models(base: Any, adapter: str, kv_dtype: str | None) -> dict[str, Any]:
    """What takes turns, by name."""
    gates = load_adapter(adapter)
    ways: dict[str, dict[str, Any]] = {
        "octavo, nothing evicted": {"adapter": None},
        adapter: {"adapter": gates},
        f"{adapter}, CUDA graphs": {"adapter": gates, "cuda_graphs": True},
        f"{adapter}, CUDA graphs, compiled": {"adapter": gates, "cuda_graphs": True, "compile": True},
    }
    made = {PLAIN: base}
    for name, way in ways.items():
        made[name] = octavo.attach(copy.deepcopy(base), kv_dtype=kv_dtype, **way)
    return made


@torch.no_grad()
def one_run(name: str, model: Any, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """(prefill seconds, seconds per decoded token)."""
    cache = DynamicCache() if name == PLAIN else octavo.KVCache(model)
    torch.cuda.synchronize()
    began = time.perf_counter()
    token = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    prefill, times = time.perf_counter() - began, []
    for _ in range(steps):
        began = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return prefill, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 8000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--adapter", default="dms-8x")
    parser.add_argument("--kv-dtype", choices=["int8", "fp8"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a GPU; bench/cpu.py measures on the CPU")
    base, tokenizer = load_plain(device="cuda", dtype=torch.bfloat16)
    stream = tokenizer(read_text(args.text), return_tensors="pt", verbose=False)["input_ids"][0]
    stream = stream.repeat(-(-(max(args.tokens) + 997 * max(args.batch)) // len(stream)))
    ways, rows = models(base, args.adapter, args.kv_dtype), []
    for tokens in args.tokens:
        for batch in args.batch:
            ids = torch.stack([stream[997 * b : 997 * b + tokens] for b in range(batch)]).cuda()
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for i in range(args.rounds + WARM):
                for name, model in ways.items():
                    run = one_run(name, model, ids, args.steps)
                    if i >= WARM:
                        runs[name].append(run)
            rows += [_row(tokens, batch, name, runs[name], runs[PLAIN]) for name in ways]
    report(rows, args.out)


def _row(
    tokens: int, batch: int, name: str, runs: list[tuple[float, float]], plain: list[tuple[float, float]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"tokens": tokens, "batch": batch, "model": name}
    for i, phase in enumerate(("prefill", "decode")):
        ratios = [run[i] / other[i] for run, other in zip(runs, plain, strict=True)]
        row[phase] = {
            "ms": 1000 * statistics.median(run[i] for run in runs),
            "of_unattached_median": statistics.median(ratios),
            "of_unattached_min": min(ratios),
            "of_unattached_max": max(ratios),
        }
    return row


def hardware() -> dict[str, Any]:
    """The GPU and its CUDA version."""
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def report(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print a table for people and a line of JSON, and write the JSON to `out`."""
    table = Table("tokens", "batch", "model", "prefill", "of unattached", "decode", "of unattached")
    for row in rows:
        cells = [f"{row['tokens']:,}", str(row["batch"]), row["model"]]
        for phase in ("prefill", "decode"):
            r = row[phase]
            spread = f"{r['of_unattached_min']:.2f} to {r['of_unattached_max']:.2f}"
            cells += [f"{r['ms']:.2f} ms", f"{r['of_unattached_median']:.2f}x ({spread})"]
        table.add_row(*cells)
    Console(width=140).print(table)
    print(json.dumps(record(out, **hardware(), rows=rows)))


if __name__ == "__main__":
    main()
