"""The commands of docs/retrofit.md are real: each command and every option of it exist, and its model can be made."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from octavo.cli import main as cli

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "retrofit.md").read_text()
SCRIPT = REPOSITORY / "bench" / "small_model.py"
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def options_of(words: list[str]) -> set[str]:
    """The options of `octavo WORDS...`, whose last words may be arguments."""
    command = typer.main.get_command(cli.app)
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def test_the_page_has_commands_of_every_kind() -> None:
    first = {tuple(words[:3]) if words[1] == "retrofit" else tuple(words[:2]) for words in LINES}
    assert first >= {
        ("python", "bench/small_model.py"), ("octavo", "retrofit", "dms"), ("octavo", "retrofit", "swiftkv"),
        ("octavo", "evaluate"),
    }  # fmt: skip


@pytest.mark.parametrize("words", [words for words in LINES if words[0] == "octavo"], ids=" ".join)
def test_every_option_exists(words: list[str]) -> None:
    named = {word.split("=")[0] for word in words if word.startswith("-")}
    assert named <= options_of(words[1:])


def test_options_that_the_text_names_exist() -> None:
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    known = options_of(["retrofit", "dms"]) | options_of(["retrofit", "swiftkv"]) | options_of(["evaluate"])
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert named
    assert named <= known


def test_the_small_model_s_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("".join(f"On day {i} the {i * i} ships of the harbour left for Ostend. " for i in range(600)))
    command = [sys.executable, SCRIPT, tmp_path / "small", "--data", text, "--held-out", text, "--steps", "2",
               "--hidden", "32", "--layers", "2", "--vocabulary", "512"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"held out, rows of 1,024: new [\d.]+, returned [\d.]+ nats", done.stdout)
    assert (tmp_path / "small-returns.txt").read_text().strip()

    from octavo.models import load_plain

    model, tokenizer = load_plain(tmp_path / "small", device="cpu")
    assert model.config.model_type == "qwen3"
    assert set(model.config.layer_types) == {"full_attention"}
    assert tokenizer.chat_template is not None
