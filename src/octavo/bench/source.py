"""Which source a benchmark measures."""

import subprocess
from pathlib import Path


def git(*arguments: str) -> str:
    """What git says of this source's repository, empty where there is none, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
