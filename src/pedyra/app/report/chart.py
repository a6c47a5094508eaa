"""Rows -> a Vega-Lite specification. The page draws it with Vega, `images` without a browser: one path for both.

Names that come from a run are data here, never part of an expression. Sizes are the reader's, colours the theme's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Spec = dict[str, Any]
Value = float | None

# Okabe and Ito's colour-blind safe set, darkened or lightened until each reads as a thin line on its ground.
PALETTE = {
    "light": ["#0068A8", "#C8500A", "#00805C", "#A8447E", "#94700A", "#4A8FBE", "#5B5BB0", "#6B6B6B"],
    "dark": ["#5EB5EE", "#FF9557", "#38C8A0", "#E79AC8", "#E8C04F", "#A6D3F5", "#B3B2F5", "#B0B0B0"],
}
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
MARKED = 12  # points; a curve of so few shows each


@dataclass(frozen=True)
class Curve:
    """One curve, or one set of points: `y` against `x`, optionally from `low` to `high`, each point with a `label`."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    labels: Sequence[str] | None = None
    kind: Literal["drawn", "raw", "quiet"] = "drawn"
    """raw: faint, under the curve of the same name. quiet: grey."""

    def rows(self) -> list[Spec]:
        """A row a point; a point without a number is left out."""
        columns = {"x": self.x, "y": self.y, "low": self.low, "high": self.high, "label": self.labels}
        known = {key: values for key, values in columns.items() if values is not None}
        points = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
        return [{"name": self.name, "kind": self.kind, **point} for point in points if point["y"] is not None]


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
    points: bool = False
    """Points with error bars instead of curves with bands."""
    line_at: tuple[str, float] | None = None
    """A named horizontal line."""


def curves(several: Sequence[Curve], axes: Axes, names: Sequence[str] = ()) -> Spec:
    """Curves with their bands, or points with their error bars, over one pair of axes.

    Args:
        names: all names that may occur, so that a name has one colour in every chart; default: those drawn.
    """
    rows = [row for curve in several for row in curve.rows()]
    if axes.log_x or axes.log_y:
        rows = [row for row in rows if (row["x"] > 0 or not axes.log_x) and (row["y"] > 0 or not axes.log_y)]
    at = {"x": _x_axis(axes, rows), "y": _y_axis(axes, rows)}
    drawn = [curve for curve in several if curve.kind == "drawn"]
    domain = list(names or dict.fromkeys(curve.name for curve in drawn))
    legend = {"values": [curve.name for curve in drawn]} if len(drawn) > 1 else None
    color = {"field": "name", "type": "nominal", "title": None, "legend": legend, "scale": {"domain": domain}}
    line = {"type": "line", "interpolate": "step-after" if axes.step else "linear"}
    who = {"field": "name", "type": "nominal", "title": " "}
    layers = []
    if any(curve.kind == "quiet" for curve in several):
        grey = {**at, "detail": {"field": "name"}, "tooltip": who}
        layers.append(_of("quiet", {**line, "style": "quiet"}, grey))
    if any(curve.kind == "raw" for curve in several):
        layers.append(_of("raw", {**line, "style": "raw"}, {**at, "color": color}))
    if any(curve.low for curve in drawn):
        mark = {"type": "rule", "style": "error"} if axes.points else {"type": "area", "style": "band"}
        ends = {"x": at["x"], "y": {**at["y"], "field": "low"}, "y2": {"field": "high"}, "color": color}
        layers.append(_of("drawn", mark, ends, "isValid(datum.low)"))
    if drawn and not axes.points:
        few = max(len(curve.x) for curve in drawn) <= MARKED and not axes.step
        layers.append(_of("drawn", {**line, "point": few}, {**at, "color": color}))
    if drawn:  # what the pointer reads: the points themselves, or invisible ones on a curve
        number = {"type": "quantitative", "format": ",.5~g"}
        told = [who, {"field": "x", "title": axes.x, **number}, {"field": "y", "title": axes.y, **number}]
        if any(curve.labels for curve in drawn):
            told.append({"field": "label", "type": "nominal", "title": "what"})
        shape = {"shape": {**color, "scale": {"domain": domain, "range": SHAPES}}} if axes.points else {}
        mark = {"type": "point", "style": "points" if axes.points else "reader"}
        layers.append(_of("drawn", mark, {**at, "color": color, **shape, "tooltip": told}))
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
    fill = {"field": "rank", "type": "quantitative", "scale": {"domain": [0, highest]}, "title": "rank"}
    told = {"tooltip": [{"field": key, "type": "nominal"} for key in ("type", "depth", "rank", "change")]}
    strong = f"datum.rank > {0.6 * highest}"

    def where(test: str, mark: Spec, encoding: Spec) -> Spec:
        return {"transform": [{"filter": test}], "mark": mark, "encoding": encoding}

    text = {"text": {"field": "label"}, **told}
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
            {"mark": {"type": "rect", "style": "cell"}, "encoding": {"color": fill, **told}},
            where("datum.change != 0", {"type": "rect", "style": "changed"}, told),
            where(f"!({strong})", {"type": "text", "style": "rank"}, text),
            where(strong, {"type": "text", "style": "rank-strong"}, text),
        ],
    }


def theme(scheme: str) -> Spec:
    """Vega-Lite's config for "light" or "dark": every colour and font of a chart."""
    dark = scheme == "dark"
    ink, muted, grid, grey, paper = (
        ("#e5e8ea", "#9ca6af", "#262c32", "#6a747d", "#13161a")
        if dark
        else ("#1a1e23", "#5a636d", "#e8eaea", "#b4bac0", "#fcfcfa")
    )
    ramp = ["#1c2228", "#2f6f9c", "#bfe3fb"] if dark else ["#f4f6f3", "#7fb2d3", "#0b3c6e"]
    words = {"labelColor": muted, "titleColor": muted, "labelFontSize": 12, "titleFontSize": 12}
    words |= {"titleFontWeight": "normal"}
    return {
        "background": paper,
        "font": 'Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif',
        "view": {"stroke": None},
        "padding": 4,
        "title": {"color": ink, "fontSize": 13, "anchor": "start", "offset": 10},
        "axis": {
            **words,
            "gridColor": grid,
            "domainColor": muted,
            "tickColor": muted,
            "titlePadding": 8,
            "tickCount": 5,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False},
        "legend": {**words, "orient": "top", "columns": 3, "symbolStrokeWidth": 2, "labelLimit": 220, "offset": 8}
        | {"gradientLength": 120, "gradientThickness": 9},
        "range": {"category": PALETTE[scheme], "heatmap": ramp, "ramp": ramp},
        "style": {
            "band": {"opacity": 0.17},
            "raw": {"strokeWidth": 1, "opacity": 0.38},
            "quiet": {"color": grey, "strokeWidth": 1, "opacity": 0.6},
            "points": {"filled": True, "size": 70, "opacity": 0.85},
            "reader": {"filled": True, "size": 160, "opacity": 0},
            "error": {"strokeWidth": 1.6, "opacity": 0.75},
            "reference": {"color": ink, "strokeDash": [5, 4], "strokeWidth": 1.2},
            "reference-label": {"color": muted, "align": "right", "dy": -7, "fontSize": 12},
            "cell": {"stroke": paper, "strokeWidth": 2},
            "changed": {"color": ink, "filled": False, "strokeWidth": 1.4},
            "rank": {"color": "#e5e8ea" if dark else "#14202b", "fontSize": 11},
            "rank-strong": {"color": "#0d1a26" if dark else "#ffffff", "fontSize": 11},
        },
    }


def plain(value: Any) -> Any:
    """Numbers as JSON has them: NaN and infinities become None, floats keep five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _x_axis(axes: Axes, rows: Sequence[Spec]) -> Spec:
    scale: Spec = {"zero": not axes.points, "nice": axes.points}
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
    words = {"type": "text", "style": "reference-label"}
    place = {"x": {"value": "width"}, "y": at}
    return [
        {"data": data, "mark": {"type": "rule", "style": "reference"}, "encoding": {"y": at}},
        {"data": data, "mark": words, "encoding": {**place, "text": {"field": "text"}}},
    ]


def _of(kind: str, mark: Spec, encoding: Spec, also: str = "true") -> Spec:
    """A layer of the curves of one kind."""
    return {
        "transform": [{"filter": f"datum.kind === '{kind}' && {also}"}],
        "mark": mark,
        "encoding": encoding,
    }
