"""The scripts in bench/ run; the one for a GPU has a small shape for the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("script", ["cpu.py", "drafts.py", "gpu.py", "gpu_kernels.py", "small_model.py", "swiftkv.py"])
def test_scripts_find_what_they_import(script: str) -> None:
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_of_a_group_share_their_pages(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "swiftkv_cuda.py", "--tiny", "--device", "cpu", "--tokens", "256", "--chunk",
               "128", "--runs", "1", "--steps", "2", "--out", tmp_path / "out.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "out.json").read_text())["held"]
    assert [each["grouped_nbytes"] / held[0]["grouped_nbytes"] for each in held] == [1, 1 / 2, 1 / 4]
