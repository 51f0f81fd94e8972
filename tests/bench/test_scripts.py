"""The scripts in bench/ run; the one for a GPU has a small shape for the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from octavo.cli.bench import app

BENCH = Path(__file__).parents[2] / "bench"


SCRIPTS = ["cpu.py", "drafts.py", "gpu.py", "gpu_all.py", "gpu_kernels.py", "small_model.py", "swiftkv.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_find_what_they_import(script: str) -> None:
    done = subprocess.run([sys.executable, BENCH / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_fails_or_takes_too_long_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_all

    python = [sys.executable, "-c"]
    parts = {
        "fails": (9, [*python, "raise SystemExit(3)"]),
        "slow": (1, [*python, "import time; time.sleep(9)"]),
        "works": (9, [*python, "print('\u2502 table \u2502'); print('{}')"]),
    }
    monkeypatch.setattr(gpu_all, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", str(tmp_path / "out"), "--parts", "fails,slow,works"])
    gpu_all.main()
    printed = capsys.readouterr().out
    assert "fails: failed, see" in printed
    assert "slow: not done within 1 s" in printed
    assert printed.endswith("s\n\u2502 table \u2502\n")


@pytest.mark.parametrize("name", ["mixed", "smollm2", "8b", "8b-prefill", "8b-equal-memory", "reuse"])
def test_each_part_for_a_gpu_is_a_command_that_there_is(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_all

    words = gpu_all.PARTS[name][1]
    command = words[words.index("bench") + 1 :]
    result = CliRunner().invoke(app, [command[0], "--help"], terminal_width=200)
    assert result.exit_code == 0
    for option in (word for word in command if word.startswith("--")):
        assert option.replace("--no-", "--") in result.output, option


def test_layers_of_a_group_share_their_pages(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "swiftkv_cuda.py", "--tiny", "--device", "cpu", "--tokens", "256", "--chunk",
               "128", "--runs", "1", "--steps", "2", "--out", tmp_path / "out.json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "out.json").read_text())["held"]
    assert [each["grouped_nbytes"] / held[0]["grouped_nbytes"] for each in held] == [1, 1 / 2, 1 / 4]
