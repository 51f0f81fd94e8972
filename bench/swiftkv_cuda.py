"""What SwiftKV saves on a GPU, at the shape of Llama-3.1-8B with random weights: prefill, decode and bytes.

    python bench/swiftkv_cuda.py --out swiftkv-cuda.json

Three modes alternate: with SwiftKV, the same attached model with SwiftKV off, and the unattached model with
SDPA. Prefill asks for the last token's logits only. The machine's own copy bandwidth and matrix rate are measured
beside. The last of `--chunk` takes `--runs` rounds, the others `--sweep-runs`.
`--tiny --device cpu` runs all of it at a small shape.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from cpu import record
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from octavo.attachment.supported import fingerprint
from octavo.swiftkv import SwiftKVAdapter, initial
from swiftkv import held, held_table, measured, speed_tables, timed

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def random_model(shape: dict[str, int], device: torch.device) -> Any:
    """A bf16 model made where it will run, so that nothing is copied there."""
    theta = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**shape, rope_parameters=theta, max_position_embeddings=131072, tie_word_embeddings=False)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def machine(device: torch.device, tiny: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) in GB/s and bf16 matrix product rate in TFLOP/s."""
    numbers, size = (2**20, 256) if tiny else (2**30, 8192)
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    copies, products = [], []
    for _ in range(13):
        copies.append(timed(device, lambda: target.copy_(source))[0])
        products.append(timed(device, lambda: left @ right)[0])
    copy, product = (statistics.median(times[3:]) for times in (copies, products))
    return {"copy_gb_s": 2 * source.nbytes / copy / 1e9, "matmul_tflop_s": 2 * size**3 / product / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kv-layers", type=int, help="K; half of the layers if left out")
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--before", type=int, default=0, help="numbers that tokens hand on, 64 at most with --tiny")
    parser.add_argument("--chunk", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--sweep-runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="decoded tokens per round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    shape = TINY if args.tiny else SHAPE
    about = machine(device, args.tiny)
    model = random_model(shape, device)
    kv_layers = args.kv_layers or shape["num_hidden_layers"] // 2
    with device:
        transform = initial(model, kv_layers, args.group, args.before)
        adapter = SwiftKVAdapter("initial", transform, fingerprint(model))
        ids = torch.randint(0, shape["vocab_size"], (1, args.tokens))
    rows = []
    for chunk in args.chunk:
        runs = args.runs if chunk == args.chunk[-1] else args.sweep_runs
        rows.append({"chunk": chunk, "runs": runs, **measured(model, [adapter], ids, runs, args.steps, chunk=chunk)})
    del adapter, transform
    kept = [held(model, g, ids, kv_layers, args.before, chunk=args.chunk[-1]) for g in (1, 2, 4)]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about |= {"gpu": gpu, "cuda": torch.version.cuda, "shape": shape}
    about |= {"kv_layers": kv_layers, "group": args.group, "before": args.before}
    print(json.dumps(record(args.out, **about, rows=rows, held=kept)))
    console = Console(width=140)
    for table in (*speed_tables(rows, "chunk"), held_table(kept)):
        console.print(table)
    console.print(
        f"{gpu or 'CPU'}: copies {about['copy_gb_s']:,.0f} GB/s, bf16 products {about['matmul_tflop_s']:,.1f} TFLOP/s; "
        f"K = {kv_layers} of {shape['num_hidden_layers']} layers, group {args.group}, before {args.before}"
    )


if __name__ == "__main__":
    main()
