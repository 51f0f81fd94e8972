"""Plots, drawn from the same numbers that are printed: the heat map of a cache, a training run, an evaluation."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from octavo.errors import OutputFileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from octavo.retrofit.results import Evaluation

SHADES = " ░▒▓█"


def heat_map_text(share: Tensor) -> list[str]:
    """One line per KV head, one cell per layer, from the kept share [layers, kv_heads] in 0..1."""
    lines = []
    for head in range(share.shape[1]):
        # The scale is the square root, or the few heads that keep nearly everything would hide the rest.
        cells = (share[:, head].clamp(0, 1).sqrt() * (len(SHADES) - 1)).round().int().tolist()
        lines.append("".join(SHADES[c] * 2 for c in cells))
    return lines


def heat_map(share: Tensor, path: Path, title: str) -> None:
    """Write the kept share [layers, kv_heads] in 0..1 as a PNG. Raises OutputFileError, as all plots do."""
    figure, axis = _figure(10, 2.2)
    image = axis.imshow(share.T.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axis.set(xlabel="layer", ylabel="KV head", title=title, yticks=range(share.shape[1]))
    figure.colorbar(image, label="share of tokens kept")
    _save(figure, path)


def training(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Write what is lowered over the steps of a run's log as a PNG, and the compression where gates are trained."""
    figure, axis = _figure(8, 4)
    steps = [entry["step"] for entry in log]
    axis.plot(steps, [entry["kl"] for entry in log], color="tab:blue", label="KL")
    axis.set(xlabel="step", ylabel="to the base model (KL: nats per token)", ylim=(0, None))
    if any(entry.get("mse") is not None for entry in log):
        axis.plot(steps, [entry["mse"] for entry in log], color="tab:green", label="relative error of hidden states")
        axis.legend(loc="upper right")
    if any(entry.get("ratio") is not None for entry in log):
        other = axis.twinx()
        other.plot(steps, [entry["ratio"] for entry in log], color="tab:orange", label="reached")
        other.plot(steps, [entry["target"] for entry in log], color="tab:gray", linestyle="--", label="target")
        other.set_ylabel("tokens per kept token")
        other.legend(loc="lower right")
    _save(figure, path)


def evaluation(result: "Evaluation", path: Path) -> None:
    """Write NLL and needle retrieval of all policies as a PNG."""
    figure, left = _figure(11, 4, 2)
    names = [row.policy for row in result.rows]
    left[0].plot([row.nll for row in result.rows], names, "o")  # points: the axis does not begin at zero
    left[0].grid(axis="x", alpha=0.4)
    lowest, highest = min(row.nll for row in result.rows), max(row.nll for row in result.rows)
    pad = max(0.02, 0.3 * (highest - lowest))
    left[0].set(xlim=(lowest - pad, highest + pad), xlabel=f"NLL past token {result.settings.nll_from} (nats)")
    left[0].invert_yaxis()
    for i, row in enumerate(result.rows):
        rings = {"marker": "o", "fillstyle": "none", "markersize": 4 + 2.5 * (len(result.rows) - i)}  # equal lines show
        left[1].plot(list(row.needle), list(row.needle.values()), label=row.policy, **rings)
    left[1].set(xlabel="prompt length (tokens)", ylabel="needles found", ylim=(-0.05, 1.1))
    left[1].legend(fontsize="small")
    _save(figure, path)


def skip_curve(rows: Sequence[tuple[float, float, str]], path: Path, limit: float | None = None) -> None:
    """Write what skipping layers costs as a PNG: (share of layers skipped, NLL to the base model, label) per point.

    `limit`: the loss of NLL that is allowed, drawn as a line.
    """
    figure, axis = _figure(6.5, 4)
    ordered = sorted(rows)
    axis.plot([share * 100 for share, *_ in ordered], [nll for _, nll, _ in ordered], marker="o")
    for share, nll, label in ordered:
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
        axis.annotate(label, (share * 100, nll), fontsize="small", **place)
    if limit is not None:
        axis.axhline(limit, color="tab:gray", linestyle="--", label=f"limit {limit:+.3f}")
        axis.legend(loc="upper left")
    axis.margins(x=0.15, y=0.2)
    axis.set(xlabel="layers that prompt tokens skip (%)", ylabel="NLL to the base model (nats per token)")
    axis.grid(alpha=0.4)
    _save(figure, path)


def quality(panels: Mapping[str, Sequence[tuple[float, float, str]]], path: Path, title: str) -> None:
    """Write quality against bytes as a PNG: per panel (share of the dense model's bytes, figure, policy) per point.

    Panels are named "title: figure (unit)".
    """
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    figure, axes = _figure(5.2 * columns, 3.8 * -(-len(panels) // columns), columns, panels)
    names = list(dict.fromkeys(name for panel in panels.values() for _, _, name in panel))
    marks, shown = "osD^v<>Ph*Xd", {}
    for axis, (head, panel) in zip(axes, panels.items(), strict=False):
        for share, value, name in panel:
            which = names.index(name)
            look = {"marker": marks[which % len(marks)], "color": f"C{which % 10}", "linestyle": "none"}
            (shown[name],) = axis.plot([share], [value], label=name, **look)
        axis.set_xscale("log", base=2)
        shares = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
        axis.set_xticks(shares, [f"1/{round(1 / share)}" if share < 1 else "1" for share in shares])
        axis.minorticks_off()
        what, _, unit = head.partition(": ")
        axis.set(title=what, ylabel=unit, xlabel="bytes of keys and values, share of a dense cache's (log scale)")
        axis.set(xlim=(min(1 / 17, *(p[0] for p in panel)) * 0.9, 1.2))
        axis.grid(alpha=0.4)
    figure.suptitle(title)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2 * columns, fontsize="small")
    _save(figure, path)


def _figure(width: float, height: float, columns: int = 1, panels: Collection[Any] = ()) -> tuple[Any, Any]:
    """A figure and its axes: one, a row of `columns`, or a flat list of at least as many as there are panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if panels:
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
        for unused in grid.flat[len(panels) :]:
            unused.set_visible(False)
        return figure, list(grid.flat)
    axes: Axes | Any = figure.subplots(1, columns)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as e:
        raise OutputFileError(f"cannot write {path}: {e.strerror or e}") from e
    except ValueError as e:  # no such format
        raise OutputFileError(f"cannot write {path}: {e}") from e
