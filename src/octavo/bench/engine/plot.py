"""The plot of `octavo bench engine`, drawn from its JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(record: Path) -> Path:
    """Draw a record's decode steps beside it, each with what it must read at the speed of a copy; the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: Mapping[str, Any] = json.loads(record.read_text())
    sizes = list(dict.fromkeys((step["batch"], step["context"]) for step in found["steps"]))
    rows = {size: _rows(found, size) for size in sizes}
    height = sum(len(each) for each in rows.values())
    figure, all_axes = plt.subplots(
        max(1, len(sizes)), figsize=(9, 0.28 * height + 0.7 * len(sizes) + 1), layout="constrained", squeeze=False,
        height_ratios=[len(each) + 1 for each in rows.values()] or None,
    )  # fmt: skip
    for axes, (batch, context) in zip(all_axes[:, 0], sizes, strict=False):
        _bars(axes, rows[batch, context])
        axes.set_title(f"{batch} x {context:,} tokens", fontsize=9, loc="left")
    all_axes[-1, 0].set_xlabel("milliseconds a step; dark: reading weights and slots at the speed of a copy")
    figure.suptitle(f"Decode steps: {found['subject']} on {found['gpu'] or 'a CPU'}", fontsize=10)
    to = record.with_suffix(".png")
    figure.savefig(to, dpi=120)
    plt.close(figure)
    return to


def _rows(found: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[str, float, float]]:
    """(name, milliseconds, share of the floor or 0) of each way and peer that was measured at a size."""
    own = [
        (step["name"], step["decode_ms"], step["of_floor"])
        for step in found["steps"]
        if (step["batch"], step["context"]) == size
    ]
    peers = [
        (f"{peer.get('engine')}, KV {peer.get('kv')}", peer["decode_ms"], 0.0)
        for peer in found["peers"]
        if "decode_ms" in peer and (peer.get("B"), peer.get("T")) == size
    ]
    return peers + own


def _bars(axes: Any, rows: Sequence[tuple[str, float, float]]) -> None:
    names, times = [name for name, _, _ in rows], [ms for _, ms, _ in rows]
    # What is much slower than the rest would leave the rest no room; its bar is cut, and its number says so.
    ends = sorted(times)
    most = 1.15 * ends[-2] if len(ends) > 1 and ends[-1] > 3 * ends[-2] else 1.12 * ends[-1]
    bars = axes.barh(names, [min(ms, most) for ms in times], color="lightsteelblue")
    axes.barh(names, [min(ms * share, most) for _, ms, share in rows], color="tab:blue")
    axes.bar_label(bars, [f"{ms:,.2f}{' (cut)' if ms > most else ''}" for ms in times], fontsize=7, padding=2)
    axes.set_xlim(0, 1.08 * most)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
