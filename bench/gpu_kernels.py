"""What the Triton kernels reach on a GPU: share of the copy bandwidth in decode, time against SDPA in prefill.

    python bench/gpu_kernels.py --out bench/results-gpu-kernels.json

Decode: one query per sequence, 8 KV heads of 128 numbers, 4 queries each, pages of 16 slots; 4,352 slots in every row,
or as many on average with 257 to 32,768 in a row (lognormal). Bytes are those of keys, values, scales and expiries;
the bandwidth is that of a copy of 2 GiB measured in the same run. Prefill: attention of one layer with 32 query heads
to itself, 7 of 8 tokens marked at random, window 256, against PyTorch's SDPA on all tokens.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from cpu import record
from gpu import hardware
from rich.console import Console
from rich.table import Table

from octavo.attention import PageLayout, Pages
from octavo.attention.cuda import begins, chunk, decode
from octavo.config import NEVER

H, G, D, S = 8, 4, 128, 16
SEQUENCES = 12


def copy_bandwidth() -> float:
    """Bytes per second of a copy, read and written."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    return 4 * 2**30 / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median") * 1e3


def lengths(rows: int, skewed: bool) -> torch.Tensor:
    """Slots of each row, [rows / H, H] int32."""
    if not skewed:
        return torch.full((rows // H, H), 4352, dtype=torch.int32)
    weight = torch.exp(1.6 * torch.randn(rows, generator=torch.Generator().manual_seed(1)))
    return (256 + (4096 * weight / weight.mean()).clamp(max=32768 - 256)).int().view(-1, H)


def filled(length: torch.Tensor, dtype: torch.dtype) -> tuple[Pages, torch.Tensor]:
    """Pages of random keys and values, in no order, and their table."""
    pages = (length + S - 1) // S
    count, layout = int(pages.sum()), PageLayout(S, D, dtype)
    made = layout.views(torch.randint(0, 60, (count * layout.nbytes,), dtype=torch.uint8, device="cuda"))
    made.position.zero_()
    made.expiry.fill_(NEVER)
    if made.key_scale is None or made.value_scale is None:
        made.key.normal_()
        made.value.normal_()
    else:
        made.key_scale.fill_(0.01)
        made.value_scale.fill_(0.01)
    table = torch.zeros(*length.shape, int(pages.max()), dtype=torch.int32)
    used = torch.arange(table.shape[-1]) < pages[..., None]
    table[used] = torch.randperm(count).int()
    return made, table.cuda()


def decode_row(layers: int, skewed: bool, dtype: torch.dtype, graph: bool, copied: float) -> dict[str, Any]:
    """One decode step of `layers` layers' worth of rows in one launch."""
    length = lengths(layers * SEQUENCES * H, skewed)
    pages, table = filled(length, dtype)
    on_gpu, B = length.cuda(), len(length)
    query = torch.randn(B, H * G, 1, D, dtype=torch.bfloat16, device="cuda")
    at = torch.full((B, 1), 10**6, dtype=torch.int32, device="cuda")
    token = torch.randn(B, H, 1, D, dtype=torch.bfloat16, device="cuda")
    new = decode.Written(token, token, (on_gpu - 1)[..., None].long(), at)
    begin = begins(on_gpu)
    timed = triton.testing.do_bench_cudagraph if graph else triton.testing.do_bench
    ms = timed(lambda: decode.attend(query, at, pages, table, on_gpu, D**-0.5, begin, new), return_mode="median")
    slot = 2 * D * dtype.itemsize + 4 + (8 if pages.key_scale is not None else 0)
    nbytes = int(length.sum()) * slot
    return {
        "layers": layers,
        "lengths": "skewed" if skewed else "uniform",
        "pages": str(dtype).removeprefix("torch."),
        "graph": graph,
        "MB": nbytes / 1e6,
        "ms": ms,
        "of_copy_bandwidth": nbytes / ms * 1e3 / copied,
    }


def prefill_row(tokens: int) -> dict[str, Any]:
    """Attention of one layer over a first chunk."""
    query = torch.randn(1, H * G, tokens, D, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 1, H, tokens, D, dtype=torch.bfloat16, device="cuda")
    marked = torch.rand(1, H, tokens, device="cuda") < 0.875
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    span = chunk.Span(zero, zero + tokens, zero)

    def ms(run: Any) -> float:
        return float(triton.testing.do_bench(run, return_mode="median"))

    sdpa = ms(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))
    ours = ms(lambda: chunk.attend(query, key, value, span, D**-0.5, marked, 256))
    dense = ms(lambda: chunk.attend(query, key, value, span, D**-0.5))
    return {"tokens": tokens, "sdpa_ms": sdpa, "evicting_ms": ours, "nothing_evicted_ms": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu_kernels.py needs a GPU")
    copied = copy_bandwidth()
    cases = [(4, False), (1, True)]
    rows = [
        decode_row(layers, skewed, dtype, graph, copied)
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
        for layers, graph in cases
        for skewed in (False, True)
    ]
    prefill = [prefill_row(tokens) for tokens in (8192, 32768)]
    table = Table("decode", "lengths", "pages", "MB", "ms", "of copy bandwidth")
    for r in rows:
        where = f"{r['layers']} layers" + (" in a CUDA graph" if r["graph"] else "")
        cells = f"{r['MB']:.0f}", f"{r['ms']:.3f}", f"{r['of_copy_bandwidth']:.1%}"
        table.add_row(where, r["lengths"], r["pages"], *cells)
    other = Table("prefill", "SDPA", "7 of 8 evicted", "nothing evicted")
    for r in prefill:
        other.add_row(f"{r['tokens']:,}", *(f"{r[k]:.2f} ms" for k in ("sdpa_ms", "evicting_ms", "nothing_evicted_ms")))
    console = Console(width=120)
    console.print(f"copy: {copied / 1e9:,.0f} GB/s", table, other)
    record(args.out, **hardware(), copy_GB_per_s=copied / 1e9, decode=rows, prefill=prefill)


if __name__ == "__main__":
    main()
