"""The figure of `pedyra bench planted`: relative error per method and profile, one panel per problem and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from pedyra.bench.planted_summary import Group, MethodSummary
from pedyra.report.chart import PALETTE
from pedyra.report.plot import FORMATS, RESOLUTION

_COLORS = PALETTE["light"]
_MARKERS = "os^DvP"
_INK, _LINE = "#1A1E23", "#E8EAEA"


def check_figure_path(path: Path) -> None:
    """Raise ValueError for a format that is not written, or a folder that is not there."""
    if path.suffix[1:] not in FORMATS:
        raise ValueError(f"--figure {path}: figures are written as svg or png; name the file so")
    if not path.parent.is_dir():
        raise ValueError(f"--figure {path}: the folder {path.parent} does not exist; create it first")


def save_planted_figure(summaries: Mapping[Group, Sequence[MethodSummary]], path: Path) -> None:
    """Write the figure as the format that `path` ends in: a small mark per seed, a large one for the mean.

    Runs that diverged have no mark.
    """
    panels: dict[tuple[str, int, int, float], dict[str, Sequence[MethodSummary]]] = {}
    for (architecture, width, depth, profile, noise), methods in summaries.items():
        panels.setdefault((architecture, width, depth, noise), {})[profile] = methods
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(summary.method for methods in summaries.values() for summary in methods))
    height = 1.2 + 0.3 * len(names)
    canvas = Figure(figsize=(4.8 * columns + 0.6, height * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    first: Axes | None = None
    for index, ((architecture, width, depth, noise), profiles) in enumerate(panels.items(), start=1):
        axes = canvas.add_subplot(rows, columns, index, sharex=first)
        first = first or axes
        axes.set_title(
            f"{architecture}, {depth} layers of width {width}, noise {noise:g}", fontsize=10, loc="left", color=_INK
        )
        _draw(axes, names, profiles)
        if (index - 1) % columns:
            axes.set_yticklabels([])
    assert first is not None
    handles, labels = first.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    canvas.savefig(path, format=path.suffix[1:], dpi=RESOLUTION, metadata={"Title": "planted ranks"})


def _draw(axes: Axes, names: Sequence[str], profiles: Mapping[str, Sequence[MethodSummary]]) -> None:
    for place, (profile, summaries) in enumerate(profiles.items()):
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        shift = 0.6 * ((place + 0.5) / len(profiles) - 0.5)  # side by side within a method's row
        rows = {summary.method: names.index(summary.method) + shift for summary in summaries}
        seeds = [(error, rows[s.method]) for s in summaries for error in s.errors if math.isfinite(error)]
        means = [(s.error, rows[s.method]) for s in summaries if math.isfinite(s.error)]
        for points, size, alpha, label in ((seeds, 7, 0.4, None), (means, 26, 1.0, profile)):
            x, y = [point[0] for point in points], [point[1] for point in points]
            axes.scatter(x, y, s=size, color=color, marker=marker, alpha=alpha, linewidths=0, label=label)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("error relative to the untouched base", fontsize=9)
    axes.set_yticks(range(len(names)), [name.replace(":", ":\n") for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(axis="x", color=_LINE, linewidth=0.7)
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color=_LINE, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
