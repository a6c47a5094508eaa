"""The figures of the page as files, drawn by matplotlib: for papers and slides.

Figure objects are used directly, with their own canvas: neither pyplot nor rcParams are touched, so that a caller's
own plots and settings stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from pedyra.report.chart import PALETTE, Chart, Figure, Frame, RankMap, Series
from pedyra.report.figures import make_figures
from pedyra.report.run_folder import read_runs

FORMATS = ("svg", "png")
PANEL_SIZE = (4.4, 3.1)  # inches
RESOLUTION = 200  # dots per inch of a PNG
LEGEND_LINE = 44  # letters beside four marks in the width of a panel
_COLORS = PALETTE["light"]
_GREY, _INK, _BAND = "#B4BAC0", "#1A1E23", "#ECEDE8"
_MARKERS = "os^DvP"


def save_figures(run_dirs: Sequence[Path], out_dir: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write every figure of the report as `out_dir/<figure>.<format>`.

    Args:
        run_dirs: run folders, as for `build_report`.
        out_dir: folder to write to, made if absent.
        formats: "svg", "png" or both.

    Returns:
        The paths written.

    Raises:
        ValueError: an unknown format, or a damaged run folder as in `build_report`.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format {unknown[0]!r} is not known: figures are written as svg or png; choose of those")
    paths = []
    for figure in make_figures(read_runs(run_dirs)):
        canvas = draw(figure)
        for name in formats:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            path = Path(out_dir) / f"{figure.id}.{name}"
            canvas.savefig(path, format=name, dpi=RESOLUTION, metadata={"Title": figure.title})
            paths.append(path)
    return paths


def draw(figure: Figure) -> Canvas:
    """The figure on a canvas of its own, at most two panels side by side."""
    panels = [(panel, frame) for panel in figure.panels for frame in _frames(panel)]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas = Canvas(figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    for index, (panel, frame) in enumerate(panels, start=1):
        axes = canvas.add_subplot(rows, columns, index)
        if isinstance(panel, RankMap):
            _draw_map(axes, panel, frame, last=panel.frames[-1])
        else:
            _draw_chart(axes, panel)
    return canvas


def _frames(panel: Chart | RankMap) -> list[Frame | None]:
    """A file has no slider, so a map is shown at its start and at its end."""
    if isinstance(panel, Chart):
        return [None]
    return [panel.frames[0], panel.frames[-1]] if len(panel.frames) > 1 else [panel.frames[0]]


def _draw_chart(axes: Axes, panel: Chart) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left", color=_INK)
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.set_ylabel(panel.y_label, fontsize=9)
    for index, phase in enumerate(panel.phases):
        label = "_nolegend_" if index else "ranks fixed"
        axes.axvspan(phase.start, phase.end, color=_BAND, zorder=0, linewidth=0, label=label)
    axes.grid(axis="y", color="#E8EAEA", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for series in panel.series:
        _draw_series(axes, panel, series)
    if panel.reference:
        name, value = panel.reference
        axes.axhline(value, color=_INK, linewidth=1, linestyle=(0, (5, 4)), label=f"{name} {value:,.0f}")
    _set_scales(axes, panel)
    named = [series for series in panel.series if series.color is not None and not series.faint]
    if len(named) > 1 or panel.reference or panel.phases:
        # Below the axes, where it can cover no curve.
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        columns = 4 if sum(len(label) for label in axes.get_legend_handles_labels()[1]) <= LEGEND_LINE else 2
        axes.legend(fontsize=7.5, frameon=False, ncols=columns, columnspacing=1.2, handlelength=1.6, **place)


def _set_scales(axes: Axes, panel: Chart) -> None:
    for log, axis, scale in ((panel.log_x, axes.xaxis, axes.set_xscale), (panel.log_y, axes.yaxis, axes.set_yscale)):
        if log:
            scale("log", nonpositive="mask")  # a gap, as on the page
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    if panel.from_zero and not panel.log_y:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low) if any((y or 0) < 0 for s in panel.series for y in s.y) else 0, max(1.03 * high, 0))
    if panel.reverse_y:
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if not panel.log_y and max(map(abs, axes.get_ylim())) >= 10_000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw_series(axes: Axes, panel: Chart, series: Series) -> None:
    # matplotlib leaves a gap at NaN, as the page does at None.
    x, y = np.array(series.x, dtype=float), np.array(series.y, dtype=float)
    color = _GREY if series.color is None else _COLORS[series.color]
    alone = sum(other.color is not None and not other.faint for other in panel.series) == 1
    label = "_nolegend_" if series.color is None or series.faint or alone else series.name
    if series.style == "bars":
        gap = float(np.diff(x).min()) if len(x) > 1 else 1.0
        axes.bar(x, y, width=0.6 * gap, color=color, label=label)
        return
    if series.style == "points":
        if series.low is not None and series.high is not None:
            axes.vlines(
                x, np.array(series.low, dtype=float), np.array(series.high, dtype=float), color=color, linewidth=1.1
            )
        marker = _MARKERS[(series.color or 0) % len(_MARKERS)]
        axes.scatter(x, y, s=26, color=color, marker=marker, linewidths=0.4, edgecolors="white", label=label)
        return
    if series.low is not None and series.high is not None:
        band = np.array([series.low, series.high], dtype=float)
        axes.fill_between(x, band[0], band[1], color=color, alpha=0.17, linewidth=0)
    axes.plot(
        x,
        y,
        color=color,
        label=label,
        linewidth=0.7 if series.color is None or series.faint else 1.6,
        alpha=0.4 if series.faint else 1.0,
        drawstyle="steps-post" if series.style == "step" else "default",
    )


def _draw_map(axes: Axes, panel: RankMap, frame: Frame | None, last: Frame) -> None:
    assert frame is not None
    cells = np.array(frame.cells, dtype=float)
    highest = max(1.0, float(np.nanmax([np.array(each.cells, dtype=float) for each in (panel.frames[0], last)])))
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    moment = f"step {frame.step}" if frame.step else "start"
    axes.set_title(f"{panel.title}, {moment}", fontsize=10, loc="left", color=_INK)
    axes.set_xlabel("depth in the model (block)", fontsize=9)
    axes.set_yticks(range(len(panel.types)), panel.types, fontsize=8)
    every = max(1, len(panel.depths) // 12)
    axes.set_xticks(
        range(0, len(panel.depths), every), ["–" if d is None else str(d) for d in panel.depths[::every]], fontsize=8
    )
    axes.spines[:].set_visible(False)
    if len(panel.depths) <= 12:
        for (row, column), rank in np.ndenumerate(cells):
            if not np.isnan(rank):
                shade = "white" if rank > 0.6 * highest else _INK
                axes.text(column, row, f"{rank:g}", ha="center", va="center", fontsize=8, color=shade)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, ticks=MaxNLocator(6, integer=True))
    bar.set_label("rank", fontsize=9)
    bar.ax.tick_params(labelsize=8)
