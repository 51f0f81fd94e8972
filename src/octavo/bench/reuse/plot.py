"""The plot of `octavo bench reuse`, drawn from its JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw what share of each trace's prompt tokens every way computed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found["traces"]
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.7 * len(traces) + 1.5), layout="constrained")
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        share = {row["trace"]: 100 * row["computed"] / row["prompt_tokens"] for row in rows if row["way"] == way}
        at = [y + i * height for y, trace in enumerate(traces) if trace in share]
        bars = axes.barh(at, [share[trace] for trace in traces if trace in share], height, label=way)
        axes.bar_label(bars, fmt="%.0f%%", fontsize=7, padding=2)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(traces))], traces)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("prompt tokens that were computed, % of all")
    axes.set_title(f"Reuse of prompts: {found['subject']}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(ways))
    figure.savefig(path, dpi=120)
    plt.close(figure)
