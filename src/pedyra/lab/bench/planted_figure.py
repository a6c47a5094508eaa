"""The figure of `pedyra bench planted`: relative error per method and profile, one panel per problem and noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pedyra.app.report.chart import Spec
from pedyra.app.report.images import check_format, save_image
from pedyra.lab.bench.planted_summary import Group, MethodSummary


def check_figure_path(path: Path) -> None:
    """Raise ValueError for a format that is not written, or a folder that is not there."""
    check_format(path)
    if not path.parent.is_dir():
        raise ValueError(f"--figure {path}: the folder {path.parent} does not exist; create it first")


def save_planted_figure(summaries: Mapping[Group, Sequence[MethodSummary]], path: Path) -> None:
    """Write the figure as the format that `path` ends in: a small mark per seed, a large one for the mean.

    Runs that diverged have no mark.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for (architecture, width, depth, profile, noise), methods in summaries.items():
        rows = panels.setdefault(f"{architecture}, {depth} layers of width {width}, noise {noise:g}", [])
        for summary in methods:
            errors = [("seed", error) for error in summary.errors] + [("mean", summary.error)]
            row = {"method": summary.method, "profile": profile}
            rows += [{**row, "kind": kind, "error": error} for kind, error in errors if math.isfinite(error)]
    save_image({"concat": [_panel(title, rows) for title, rows in panels.items()], "columns": 2}, path)


def _panel(title: str, rows: list[dict[str, Any]]) -> Spec:
    profile = {"field": "profile", "type": "nominal", "sort": None}
    error = {"field": "error", "type": "quantitative", "scale": {"type": "log", "nice": False, "padding": 10}}
    sizes = {"domain": ["seed", "mean"], "range": [14, 60]}
    return {
        "title": title,
        "width": 340,
        "height": {"step": 9, "for": "offset"},
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "opacity": 0.8},
        "encoding": {
            "x": {**error, "title": "error relative to the untouched base"},
            "y": {"field": "method", "type": "nominal", "sort": None, "title": None, "axis": {"grid": True}},
            "yOffset": profile,
            "color": profile,
            "shape": profile,
            "size": {"field": "kind", "type": "nominal", "scale": sizes, "legend": None},
        },
    }
