"""The tables of `octavo bench engine`, and its record."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from octavo.bench.engine.mixed import Run
from octavo.bench.engine.steps import Step
from octavo.errors import ConfigError


def peer_steps(path: Path) -> list[dict[str, Any]]:
    """Lines of a peer's run, each JSON with `engine`, `shape`, `kv`, `what` and times. Raises ConfigError."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the peer's figures in {path}: {e}") from e
    return [line for line in lines if isinstance(line, dict) and "what" in line]


def show(steps: Sequence[Step], runs: Sequence[Run], peers: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what was measured, each against the first of its kind."""
    if steps:
        table = Table(
            "batch x context", "model", "prefill", "decode step", "tokens/s", "KV read", "of the floor", "J/token"
        )
        for step in steps:
            table.add_row(
                f"{step.batch} x {step.context:,}", step.name, f"{step.prefill_ms:,.1f} ms",
                f"{step.decode_ms:,.2f} ms",
                f"{1000 * step.batch / step.decode_ms:,.0f}", f"{step.kv_bytes / 1e6:,.0f} MB",
                f"{step.of_floor:.0%}", "" if step.joules is None else f"{step.joules:.3f}",
            )  # fmt: skip
        console.print(table)
    if peers:
        table = Table("batch x context", "peer", "KV", "what", "ms")
        for line in peers:
            ms = line.get("decode_ms", line.get("prefill_ms", ""))
            size = f"{_number(line.get('B', ''), ',')} x {_number(line.get('T', ''), ',')}"
            table.add_row(size, str(line.get("engine")), str(line.get("kv")), str(line["what"]), _number(ms, ",.2f"))
        console.print(table)
    if runs:
        table = Table("mixed requests", "seconds", "tokens/s", "of the first", "most KV memory", "J/token")
        for run in runs:
            memory = "" if run.kv_bytes is None else f"{run.kv_bytes / 2**20:,.0f} MiB"
            table.add_row(
                run.name, f"{run.seconds:,.1f}", f"{run.rate:,.0f}", f"{run.rate / runs[0].rate:.2f}x", memory,
                "" if run.joules is None else f"{run.joules:.3f}",
            )  # fmt: skip
        console.print(table)


def _number(value: Any, form: str) -> str:
    """A peer's figure, which may be anything that JSON has."""
    return format(value, form) if isinstance(value, int | float) else str(value)


def record(
    where: dict[str, Any], subject: str, bandwidth: float, steps: Sequence[Step], runs: Sequence[Run],
    peers: Sequence[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Everything as JSON values; `where` is what `surroundings` gave."""
    return {
        **where,
        "subject": subject,
        "copy_GB_per_s": bandwidth / 1e9,
        "steps": [asdict(step) for step in steps],
        "mixed": [{**asdict(run), "tokens_per_s": run.rate} for run in runs],
        "peers": list(peers),
    }
