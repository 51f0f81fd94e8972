"""Every measurement of the README that needs a GPU, one after another, each in a process of its own.

    python bench/gpu_all.py FOLDER                       # some ten minutes on an H200
    python bench/gpu_all.py FOLDER --parts kernels,mixed --peer vllm.jsonl

Records and logs land in FOLDER. What fails or takes longer than its limit is said and left out; the others go on.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).parent
OCTAVO = [sys.executable, "-c", "from octavo.cli.main import app; app()", "bench"]
SHAPE = ["--shape", "llama8b", "--no-plain", "--compile", "--device", "cuda"]
KINDS = "dense,model,int8,fp8"
PARTS: dict[str, tuple[int, list[str]]] = {  # by name: seconds at most, what is run; the record's file comes behind
    "kernels": (120, [sys.executable, str(BENCH / "gpu_kernels.py")]),
    "generate": (150, [sys.executable, str(BENCH / "gpu.py"), "--rounds", "5", "--steps", "8"]),
    "mixed": (300, [*OCTAVO, "engine", "--sizes", "", "--mixed", "64", "--no-one-by-one", "--compile"]),
    "smollm2": (
        180, [*OCTAVO, "engine", "--sizes", "1x512,1x8000,64x2000", "--steps", "99", "--compile", "--kv", KINDS],
    ),
    "8b": (
        300, [*OCTAVO, "engine", *SHAPE, "--sizes", "1x8192,8x8192,12x32768", "--steps", "150", "--kv", KINDS],
    ),
    "8b-prefill": (
        180, [*OCTAVO, "engine", *SHAPE, "--sizes", "1x32768", "--steps", "9", "--kv", "dense,model", "--swiftkv"],
    ),
    "8b-equal-memory": (
        240, [*OCTAVO, "engine", *SHAPE, "--sizes", "84x32768", "--distinct", "6", "--steps", "99", "--kv", "model"],
    ),
    "reuse": (240, [*OCTAVO, "reuse", "--part", "first", "--rounds", "3", "--dtype", "bf16", "--device", "cuda"]),
}  # fmt: skip


def run(name: str, folder: Path, peers: list[str]) -> str:
    """Run one part; the table that it printed, or why there is none."""
    limit, command = PARTS[name]
    engine = "engine" in command
    whole = [*command, "--out", str(folder / f"{name}.json"), *(peers if engine else [])]
    log = folder / f"{name}.log"
    began = time.perf_counter()
    with log.open("w") as file:
        try:
            status = subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return f"{name}: not done within {limit} s; what it had is in {folder}"
    took = time.perf_counter() - began
    if status:
        return f"{name}: failed, see {log}"
    lines = [line for line in log.read_text().splitlines() if line.startswith(tuple("┏┃┡│└"))]
    return f"{name}, {took:.0f} s\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--peer", action="append", default=[], help="JSON lines of a peer's run, shown beside")
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    peers = [part for path in args.peer for part in ("--peer", path)]
    for name in chosen:
        print(run(name, args.folder, peers), flush=True)


if __name__ == "__main__":
    main()
