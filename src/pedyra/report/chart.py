"""What a figure is, apart from how it is drawn: the page draws these records in SVG, `plot` in matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = float | None

# Okabe and Ito's colour-blind safe set, darkened or lightened until each reads as a thin line on its ground.
PALETTE = {
    "light": ["#0068A8", "#C8500A", "#00805C", "#A8447E", "#94700A", "#4A8FBE", "#5B5BB0", "#6B6B6B"],
    "dark": ["#5EB5EE", "#FF9557", "#38C8A0", "#E79AC8", "#E8C04F", "#A6D3F5", "#B3B2F5", "#B0B0B0"],
}


@dataclass(frozen=True)
class Series:
    """One curve, set of points or set of bars. `color` is a slot of the palette, None the quiet grey."""

    name: str
    x: Sequence[Value]
    y: Sequence[Value]
    style: Literal["line", "step", "points", "bars"] = "line"
    color: int | None = 0
    low: Sequence[Value] | None = None  # a band around the curve, from low to high; around points, lines
    high: Sequence[Value] | None = None
    faint: bool = False  # drawn thin and left out of the legend
    labels: Sequence[str] | None = None  # what each point is


@dataclass(frozen=True)
class Phase:
    """A stretch of steps in which the schedule moves no ranks, drawn as a quiet band behind the curves."""

    start: int
    end: int


@dataclass(frozen=True)
class Chart:
    """One pair of axes. Labels carry the unit."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False  # the y axis starts at 0
    reverse_y: bool = False  # 1 at the top, for places in a ranking
    phases: Sequence[Phase] = ()
    reference: tuple[str, int] | None = None  # a named horizontal line
    kind: Literal["axes"] = field(default="axes", init=False)


@dataclass(frozen=True)
class Frame:
    """The ranks at one moment: one row per type, one column per depth; `changes` since the frame before."""

    step: int
    text: str
    cells: Sequence[Sequence[Value]]
    changes: Sequence[Sequence[Value]]


@dataclass(frozen=True)
class RankMap:
    """Ranks as module type x depth, one frame per adjustment, the start first."""

    title: str
    types: Sequence[str]
    depths: Sequence[int | None]
    frames: Sequence[Frame]
    kind: Literal["map"] = field(default="map", init=False)


@dataclass(frozen=True)
class Figure:
    """One numbered figure of the page: panels, and a caption that says what is seen."""

    id: str
    section: str
    title: str
    caption: str
    panels: Sequence[Chart | RankMap]
    paper: str | None = None  # the figure of the paper it matches
    highlight: bool = False  # offers a choice of one series to bring out in every panel


def plain(value: Any) -> Any:
    """The record as JSON types: NaN and infinities become None, floats keep five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
