"""Rows -> a Vega-Lite specification. The page draws it with Vega, `images` without a browser: one path for both.

Names that come from a run are data here, never part of an expression. Sizes are the reader's, colours the theme's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
Value = float | None

# Okabe and Ito's colour-blind safe set, darkened or lightened until each reads as a thin line on its ground.
PALETTE = {
    "light": ["#0068A8", "#C8500A", "#00805C", "#A8447E", "#94700A", "#4A8FBE", "#5B5BB0", "#6B6B6B"],
    "dark": ["#5EB5EE", "#FF9557", "#38C8A0", "#E79AC8", "#E8C04F", "#A6D3F5", "#B3B2F5", "#B0B0B0"],
}
GREY, CHANGED = "#78828c", "#C8500A"
MARKED = 12  # points; a curve of so few shows each


@dataclass(frozen=True)
class Curve:
    """One curve: `y` against `x`, with a band from `low` to `high` where they are given."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    quiet: bool = False
    """Grey, under the others."""

    def rows(self) -> list[Spec]:
        """A row a point; a point without a number is left out."""
        columns = {"x": self.x, "y": self.y, "low": self.low, "high": self.high}
        known = {key: values for key, values in columns.items() if values is not None}
        points = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
        kind = "quiet" if self.quiet else "drawn"
        return [{"name": self.name, "kind": kind, **point} for point in points if point["y"] is not None]


@dataclass(frozen=True)
class Axes:
    """A pair of axes, and how curves are drawn over it."""

    x: str
    """Title, with the unit."""
    y: str
    log_x: bool = False
    log_y: bool = False
    linear_to: float | None = None
    """y is linear up to so much to both sides of 0, and logarithmic beyond."""
    from_zero: bool = False
    """The y axis includes 0."""
    reverse: bool = False
    """1 is at the top, for places in a ranking."""
    step: bool = False
    """A value holds until the next."""
    line_at: tuple[str, float] | None = None
    """A named horizontal line."""


def curves(several: Sequence[Curve], axes: Axes) -> Spec:
    """Curves with their bands over one pair of axes."""
    rows = [row for curve in several for row in curve.rows()]
    if axes.log_x or axes.log_y:
        rows = [row for row in rows if (row["x"] > 0 or not axes.log_x) and (row["y"] > 0 or not axes.log_y)]
    at = {"x": _x_axis(axes, rows), "y": _y_axis(axes, rows)}
    drawn = [curve for curve in several if not curve.quiet]
    legend = {"values": [curve.name for curve in drawn]} if len(drawn) > 1 else None
    scale = {"domain": [curve.name for curve in drawn]}
    color = {"field": "name", "type": "nominal", "title": None, "legend": legend, "scale": scale}
    line = {"type": "line", "interpolate": "step-after" if axes.step else "linear"}
    who = {"field": "name", "type": "nominal", "title": " "}
    layers = []
    if len(drawn) < len(several):
        grey = {**at, "detail": {"field": "name"}, "tooltip": who}
        layers.append(_of("quiet", {**line, "color": GREY, "strokeWidth": 1, "opacity": 0.5}, grey))
    if any(curve.low for curve in drawn):
        ends = {"x": at["x"], "y": {**at["y"], "field": "low"}, "y2": {"field": "high"}, "color": color}
        layers.append(_of("drawn", {"type": "area", "opacity": 0.17}, ends, "isValid(datum.low)"))
    if drawn:
        few = max(len(curve.x) for curve in drawn) <= MARKED and not axes.step
        layers.append(_of("drawn", {**line, "point": few}, {**at, "color": color}))
        number = {"type": "quantitative", "format": ",.5~g"}
        told = [who, {"field": "x", "title": axes.x, **number}, {"field": "y", "title": axes.y, **number}]
        reader = {"type": "point", "filled": True, "size": 160, "opacity": 0}  # what the pointer reads
        layers.append(_of("drawn", reader, {**at, "color": color, "tooltip": told}))
    if axes.line_at:
        layers += _named_line(*axes.line_at, at["y"])
    return {"data": {"values": rows}, "layer": layers}


def rank_map(cells: Sequence[Mapping[str, Any]], *, at: str = "adjustment") -> Spec:
    """Ranks as module type by depth, coloured by rank.

    Args:
        cells: one row a place in the model: `type`, `depth` (as text), and `ranks`, `changes`: one each per frame.
        at: the number of the frame to draw, as an expression; by default the parameter `adjustment`.
    """
    highest = max([1, *(rank for cell in cells for rank in cell["ranks"])])
    number = "format(datum.rank, datum.rank % 1 ? '.1f' : 'd')"
    mark = "datum.change > 0 ? '▲' : datum.change < 0 ? '▼' : ''"
    axis = {"ticks": False, "domain": False, "grid": False, "labelAngle": 0}
    place = {"type": "nominal", "sort": None, "axis": axis}
    scale = {"domain": [0, highest], "scheme": "blues"}
    fill = {"field": "rank", "type": "quantitative", "scale": scale, "title": "rank"}
    told = {"tooltip": [{"field": key, "type": "nominal"} for key in ("type", "depth", "rank", "change")]}
    on_dark = {"condition": {"test": f"datum.rank > {0.6 * highest}", "value": "white"}, "value": "#14202b"}
    changed = {"type": "rect", "filled": False, "color": CHANGED, "strokeWidth": 1.4}
    return {
        "data": {"values": list(cells)},
        "width": {"step": 30},
        "height": {"step": 24},
        "transform": [
            {"calculate": f"datum.ranks[{at}]", "as": "rank"},
            {"calculate": f"datum.changes[{at}]", "as": "change"},
            {"calculate": f"{number} + ({mark})", "as": "label"},
        ],
        "encoding": {
            "x": {"field": "depth", **place, "title": "depth in the model (block)"},
            "y": {"field": "type", **place, "title": None},
        },
        "layer": [
            {"mark": "rect", "encoding": {"color": fill, **told}},
            {"transform": [{"filter": "datum.change != 0"}], "mark": changed, "encoding": told},
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "label"}, "color": on_dark, **told},
            },
        ],
    }


def theme(scheme: str) -> Spec:
    """Vega-Lite's config for "light" or "dark"."""
    light, dark = ("#fcfcfa", "#1a1e23", "#5a636d", "#e8eaea"), ("#13161a", "#e5e8ea", "#9ca6af", "#262c32")
    paper, strong, ink, grid = dark if scheme == "dark" else light
    words = {
        "labelColor": ink,
        "titleColor": ink,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    return {
        "background": paper,
        "font": 'system-ui, "Liberation Sans", Arial, sans-serif',
        "view": {"stroke": None},
        "title": {"color": strong, "fontSize": 13, "anchor": "start", "offset": 10},
        "axis": {**words, "gridColor": grid, "domainColor": ink, "tickColor": ink, "tickCount": 5},
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False},
        # The symbols are opaque, though the band under a curve is not.
        "legend": {
            **words,
            **{"orient": "top", "columns": 3, "labelLimit": 220, "gradientLength": 120, "symbolOpacity": 1},
        },
        "range": {"category": PALETTE[scheme]},
    }


def plain(value: Any) -> Any:
    """Numbers as JSON has them: NaN and infinities become None, floats keep five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _x_axis(axes: Axes, rows: Sequence[Spec]) -> Spec:
    scale: Spec = {"zero": True, "nice": False}
    if axes.log_x:
        scale = {"type": "log", "nice": False, "padding": 8}
    return _axis("x", axes.x, scale, [row["x"] for row in rows])


def _y_axis(axes: Axes, rows: Sequence[Spec]) -> Spec:
    values = [row[key] for row in rows for key in ("y", "low", "high") if row.get(key) is not None]
    if axes.line_at:
        values.append(axes.line_at[1])
    whole = axes.from_zero or axes.reverse
    scale: Spec = {"zero": axes.from_zero, "reverse": axes.reverse, "nice": not axes.reverse}
    scale["padding"] = 0 if whole else 4
    if axes.log_y:
        scale = {"type": "log", "nice": False, "padding": 8}
    found = _axis("y", axes.y, scale, values)
    if axes.linear_to:
        decades = math.ceil(math.log10(max([axes.linear_to, *map(abs, values)]) / axes.linear_to))
        ticks = [0, *(axes.linear_to * 10**power for power in range(decades + 1))]
        found["scale"] = {"type": "symlog", "constant": axes.linear_to, "nice": False, "padding": 8}
        found["axis"] = {"values": ticks, "format": ".2~g"}
    return found


def _axis(field: str, title: str, scale: Spec, values: Sequence[float]) -> Spec:
    """An axis; around a single value there is room, since Vega would draw that beside any tick."""
    if len(set(values)) == 1 and not (scale.get("zero") and values[0]):
        value = values[0]
        low, high = value - abs(value) / 10, value + abs(value) / 10
        if scale.get("type") == "log":
            low, high = value / 2, value * 2
        scale = {**scale, "domain": [low, high] if value else [-1, 1], "nice": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def _named_line(name: str, value: float, at: Spec) -> list[Spec]:
    data = {"values": [{"y": value, "text": f"{name} {value:,}"}]}
    words = {"type": "text", "align": "right", "dy": -7, "color": GREY}
    place = {"x": {"value": "width"}, "y": at}
    return [
        {
            "data": data,
            "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.5, "color": GREY},
            "encoding": {"y": at},
        },
        {"data": data, "mark": words, "encoding": {**place, "text": {"field": "text"}}},
    ]


def _of(kind: str, mark: Spec, encoding: Spec, also: str = "true") -> Spec:
    """A layer of the curves of one kind."""
    return {
        "transform": [{"filter": f"datum.kind === '{kind}' && {also}"}],
        "mark": mark,
        "encoding": encoding,
    }
