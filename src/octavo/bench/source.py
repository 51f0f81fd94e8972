"""What a benchmark measures and where: the source, the machine, the versions, the command line."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def git(*arguments: str) -> str:
    """What git says of this source's repository, empty where there is none, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def processor() -> str:
    """The processor's name, with family and model where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    model = f"family {names['cpu family']}, model {names['model']}" if "cpu family" in names else ""
    return ", ".join(part for part in (names.get("model name", platform.machine()), model) if part)


def surroundings(device: "torch.device | None" = None) -> dict[str, Any]:
    """Where and with what models are measured; `gpu` is None where that was on the CPU."""
    import torch
    import transformers

    on_gpu = device is not None and device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
