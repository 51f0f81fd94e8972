"""What SwiftKV saves on the CPU: prefill, decode and bytes, against the same model, in alternating runs.

    python bench/swiftkv.py --dtype bf16 fp32 --runs 5 --out swiftkv.json

Prefill asks for the last token's logits only. "attached" is the same attached model with SwiftKV off, "unattached"
is transformers' own with `DynamicCache` and SDPA. Decoding alternates step by step between two caches, one with
SwiftKV and one without. By default the transform is the untrained start at half of the layers, which costs the
same time as a trained one that hands nothing on.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import DTYPES, record
from rich.console import Console
from rich.table import Table

import octavo
from octavo.attachment import KVCache, attachment_of, fill
from octavo.attachment.adapters import resolve
from octavo.attachment.supported import fingerprint
from octavo.cli.demo import TEXT
from octavo.models import load_plain
from octavo.retrofit.data import read_text
from octavo.swiftkv import SwiftKVAdapter, initial

MODES = ("swiftkv", "attached", "unattached")


def use(model: Any, adapters: list[Any], mode: str, ids: torch.Tensor, **settings: Any) -> None:
    """Put the model into a mode; a short forward, so that the weights are cast and the kernels are there."""
    if mode == "unattached":
        if attachment_of(model) is not None:
            octavo.detach(model)
            gc.collect()  # of an attachment's cycles, before the next one casts its weights
    else:
        if attachment_of(model) is None:
            octavo.attach(model, adapters, **settings)
        octavo.set_swiftkv(model, mode == "swiftkv")
    model(input_ids=ids[:, :4], logits_to_keep=1)


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result): CUDA events on a GPU, wall time elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    result = call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, result


@torch.no_grad()
def one_round(model: Any, adapters: list[Any], ids: torch.Tensor, steps: int, **settings: Any) -> dict[str, Any]:
    """Prefill seconds of each mode, and seconds of `steps` decoded tokens with SwiftKV and without."""
    prefill: dict[str, float] = {}
    decode: dict[str, list[float]] = {mode: [] for mode in MODES}
    feeds: dict[str, list[Any]] = {}

    def step(mode: str) -> None:
        cache, token = feeds[mode]
        took, result = timed(ids.device, lambda: model(input_ids=token, past_key_values=cache))
        feeds[mode][1] = result.logits[:, -1:].argmax(-1)
        decode[mode].append(took)

    for mode in reversed(MODES):  # the unattached first: attaching anew makes caches useless
        use(model, adapters, mode, ids, **settings)
        prefill[mode], result = timed(ids.device, lambda: model(input_ids=ids, logits_to_keep=1))
        feeds[mode] = [result.past_key_values, result.logits[:, -1:].argmax(-1)]
        if mode == "unattached":
            for _ in range(steps):
                step(mode)
            feeds.clear()
    for _ in range(steps):
        for mode in feeds:
            octavo.set_swiftkv(model, mode == "swiftkv")
            step(mode)
    return {"prefill": prefill, "decode": decode}


def measured(
    model: Any, adapters: list[Any], ids: torch.Tensor, runs: int, steps: int, **settings: Any
) -> dict[str, Any]:
    """Medians over rounds, the first left out; ratios are taken within a round. `settings` go to `attach`."""
    rounds = [one_round(model, adapters, ids, steps, **settings) for _ in range(runs + 1)][1:]
    if attachment_of(model) is not None:
        octavo.detach(model)
    row: dict[str, Any] = {"tokens": ids.shape[1]}
    row |= {f"prefill_{mode}_s": statistics.median(r["prefill"][mode] for r in rounds) for mode in MODES}
    for mode in MODES[1:]:
        ratios = [r["prefill"][mode] / r["prefill"]["swiftkv"] for r in rounds]
        row[f"speedup_to_{mode}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    steps = {mode: [t for r in rounds for t in r["decode"][mode]] for mode in MODES}
    if steps["swiftkv"]:
        row |= {f"decode_{mode}_s": statistics.median(steps[mode]) for mode in MODES}
        pairs = zip(steps["swiftkv"], steps["attached"], strict=True)
        row["decode_ratio"] = statistics.median(after / before for after, before in pairs)
    return row


@torch.no_grad()
def held(model: Any, group: int, ids: torch.Tensor, kv_layers: int, before: int = 0, **settings: Any) -> dict[str, Any]:
    """Bytes of a real cache with layers from `kv_layers` on in groups, and those of their pages alone."""
    with ids.device:
        transform = initial(model, kv_layers, group, before)
    octavo.attach(model, SwiftKVAdapter(f"group {group}", transform, fingerprint(model)), **settings)
    cache = KVCache(model)
    fill(model, ids, cache)
    tables, pool = cache.tables, cache.tables.pool
    slots = tables.length[tables.index(cache.rows)][:, kv_layers : cache.shape.read_layers]
    upper = int(((slots + pool.layout.page_size - 1) // pool.layout.page_size).sum()) * pool.page_nbytes
    octavo.detach(model)
    return {
        "group": group,
        "kv_layers": kv_layers,
        "nbytes": cache.nbytes,
        "dense_nbytes": cache.dense_nbytes,
        "grouped_nbytes": upper,
    }


def half(model: Any) -> SwiftKVAdapter:
    """The untrained transform at half of the layers."""
    return SwiftKVAdapter("initial", initial(model, model.config.num_hidden_layers // 2), fingerprint(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1000, 4000])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--adapter", help="SwiftKV adapter, alone or with gates ('swiftkv+dms-8x')")
    parser.add_argument(
        "--runs", type=int, default=5, help="rounds; prompts under 1,000 tokens take four times as many"
    )
    parser.add_argument("--steps", type=int, default=24, help="decoded tokens per round, from 1,000 tokens on")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        model, tokenizer = load_plain(dtype=DTYPES[dtype], device="cpu")
        stream = tokenizer(read_text(args.text), return_tensors="pt", verbose=False)["input_ids"]
        stream = stream.repeat(1, -(-max(args.tokens) // stream.shape[1]))
        adapters = resolve(args.adapter) if args.adapter else [half(model)]
        spec = next((a.transform.spec for a in adapters if isinstance(a, SwiftKVAdapter)), None)
        if spec is None:
            parser.error(f"{args.adapter} holds no SwiftKV transform")
        for tokens in args.tokens:
            long = tokens >= 1000
            runs, steps = (args.runs, args.steps) if long else (4 * args.runs, 0)
            rows.append({"dtype": dtype, **measured(model, adapters, stream[:, :tokens], runs, steps)})
            print(rows[-1], file=sys.stderr)
    kv_layers = spec.layers - -(-spec.upper // 4) * 4  # a number of layers that groups of 2 and 4 divide
    kept = [held(model, group, stream[:, : max(args.tokens)], kv_layers, spec.before) for group in (1, 2, 4)]
    sizes = [{"dtype": args.dtype[-1], "tokens": max(args.tokens), **each} for each in kept]
    console = Console(width=140)
    for table in (*speed_tables(rows, "dtype"), held_table(sizes)):
        console.print(table)
    about = {"adapter": args.adapter or "initial", "skipped": spec.upper / spec.layers}
    print(json.dumps(record(args.out, **about, rows=rows, held=sizes)))


def speed_tables(rows: list[dict[str, Any]], key: str) -> list[Table]:
    """Prefill and decode of all rows; `key` names what tells rows apart beside their tokens."""
    prefill = Table(key, "tokens", *MODES, *(f"to {mode} (min to max)" for mode in MODES[1:]), title="prefill")
    decode = Table(key, "tokens", *MODES, "swiftkv / attached", title="decode, per token")
    for row in rows:
        first = (str(row[key]), f"{row['tokens']:,}")
        ratios = ["{:.2f}x ({:.2f} to {:.2f})".format(*row[f"speedup_to_{mode}"]) for mode in MODES[1:]]
        prefill.add_row(*first, *(f"{row[f'prefill_{mode}_s'] * 1e3:,.1f} ms" for mode in MODES), *ratios)
        if "decode_ratio" in row:
            times = [f"{row[f'decode_{mode}_s'] * 1e3:.2f} ms" for mode in MODES]
            decode.add_row(*first, *times, f"{row['decode_ratio']:.3f}")
    return [prefill, decode]


def held_table(sizes: list[dict[str, Any]]) -> Table:
    """Bytes of each group, the first being group 1's."""
    table = Table("K", "group", "bytes held", "of dense", "grouped layers' pages", "to group 1", title="KV cache")
    for each in sizes:
        table.add_row(
            str(each["kv_layers"]), str(each["group"]), f"{each['nbytes']:,}",
            f"1/{each['dense_nbytes'] / each['nbytes']:.2f}", f"{each['grouped_nbytes']:,}",
            f"1/{sizes[0]['grouped_nbytes'] / each['grouped_nbytes']:g}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
