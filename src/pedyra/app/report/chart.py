"""Rows -> a Vega-Lite specification. The page draws it with Vega, `images` without a browser: one path for both.

Names that come from a run are data here, never part of an expression. Sizes are the reader's, colours the theme's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    """raw: faint, under the curve of the same name. quiet: grey; the parameter `brought` names one curve, of any kind,
    to bring out."""


@dataclass(frozen=True)
class Axes:
    """A pair of axes, and how curves are drawn over it."""

    x: str
    """Title, with the unit."""
    y: str
    log_x: bool = False
    log_y: bool = False
    bend: float | None = None
    """y is linear up to so much to both sides of 0, and logarithmic beyond."""
    from_zero: bool = False
    """The y axis includes 0."""
    reverse: bool = False
    """1 is at the top, for places in a ranking."""
    step: bool = False
    """A value holds until the next."""
    points: bool = False
    """Points with error bars instead of curves with bands."""
    fixed: Sequence[tuple[int, int]] = ()
    """Stretches of x drawn as a grey band."""
    line_at: tuple[str, float] | None = None
    """A named horizontal line."""


def curves(several: Sequence[Curve], axes: Axes, names: Sequence[str] = ()) -> Spec:
    """Curves with their bands, or points with their error bars, over one pair of axes.

    Args:
        names: all names that may occur, so that a name has one colour in every chart; default: those drawn.
    """
    log_x, log_y, points, step = axes.log_x, axes.log_y, axes.points, axes.step
    drawn, raw, quiet = ([curve for curve in several if curve.kind == kind] for kind in ("drawn", "raw", "quiet"))
    banded = any(curve.low and curve.high for curve in several)  # one without a band has one of no width
    rows = [
        {"name": curve.name, "kind": curve.kind, "x": _placed(curve.x, log_x), "y": _placed(curve.y, log_y)}
        | ({"low": _placed(curve.low or curve.y, log_y)} if banded else {})
        | ({"high": _placed(curve.high or curve.y, log_y)} if banded else {})
        | ({"label": curve.labels} if curve.labels else {})
        for curve in (*drawn, *raw, *quiet)
    ]
    parts = [key for key in ("x", "y", "low", "high", "label") if any(key in row for row in rows)]
    free: Spec = {"zero": axes.from_zero, "reverse": axes.reverse, "nice": not axes.reverse}
    free["padding"] = 0 if axes.from_zero or axes.reverse else 4
    logarithmic = {"type": "log", "nice": False, "padding": 8}
    placed = {key: [v for row in rows for v in row.get(key, ()) if v is not None] for key in ("x", "y", "low", "high")}
    heights = [*placed["y"], *placed["low"], *placed["high"], *([axes.line_at[1]] if axes.line_at else [])]
    at_x = _axis("x", axes.x, logarithmic if log_x else {"zero": not points, "nice": points}, placed["x"])  # pyright: ignore[reportArgumentType]
    at_y = _axis("y", axes.y, logarithmic if log_y else free, heights)
    if axes.bend:
        powers = range(1 + max(0, math.ceil(math.log10(max([axes.bend, *map(abs, heights)]) / axes.bend))))
        ticks = [0, *(axes.bend * 10**power for power in powers)]
        at_y["scale"] = {"type": "symlog", "constant": axes.bend, "nice": False, "padding": 8}
        at_y["axis"] = {"values": ticks, "format": ".2~g"}
    at: Spec = {"x": at_x, "y": at_y}
    scale = {"domain": list(names or dict.fromkeys(curve.name for curve in drawn))}
    legend = {"values": [curve.name for curve in drawn]} if len(drawn) > 1 else None
    color = {"field": "name", "type": "nominal", "title": None, "legend": legend, "scale": scale}
    line = {"type": "line", "interpolate": "step-after" if step else "linear"}
    who = {"field": "name", "type": "nominal", "title": " "}
    number = {"type": "quantitative", "format": ",.5~g"}
    told = [who, {"field": "x", "title": axes.x, **number}, {"field": "y", "title": axes.y, **number}]
    told += [{"field": "label", "type": "nominal", "title": "what"}] if "label" in parts else []
    layers: list[Spec] = []
    if axes.fixed:
        values = {"values": [{"x": start, "end": end} for start, end in axes.fixed]}
        encoding = {"x": at_x, "x2": {"field": "end"}}
        layers.append({"data": values, "mark": {"type": "rect", "style": "fixed"}, "encoding": encoding})
    if quiet:
        grey = {**at, "detail": {"field": "name"}}
        layers.append(_of("quiet", {**line, "style": "quiet"}, {**grey, "tooltip": who}))
    if raw:
        layers.append(_of("raw", {**line, "style": "raw"}, {**at, "color": color}))
    if "low" in parts:
        mark = {"type": "rule", "style": "error"} if points else {"type": "area", "style": "band"}
        ends = {"y": {**at_y, "field": "low"}, "y2": {"field": "high"}}
        layers.append(_of("drawn", mark, {"x": at_x, **ends, "color": color}))
    if drawn and not points:
        few = max(len(curve.x) for curve in drawn) <= MARKED and not step
        layers.append(_of("drawn", {**line, "point": few}, {**at, "color": color}))
    if quiet:
        brought = {"transform": [{"filter": "datum.name === brought"}], "mark": {**line, "style": "brought"}}
        layers.append({**brought, "encoding": grey})
    if drawn:  # what the pointer reads: the points themselves, or invisible ones on a curve
        shaped = {"color": color, "shape": {**color, "scale": {**scale, "range": SHAPES}}} if points else {}
        mark = {"type": "point", "style": "points" if points else "reader"}
        layers.append(_of("drawn", mark, {**at, **shaped, "tooltip": told}))
    if axes.line_at:
        name, value = axes.line_at
        data = {"data": {"values": [{"y": value, "text": f"{name} {value:,}"}]}}
        layers.append({**data, "mark": {"type": "rule", "style": "reference"}, "encoding": {"y": at_y}})
        encoding = {"y": at_y, "text": {"field": "text"}}
        layers.append({**data, "mark": {"type": "text", "style": "reference-label", "x": 4}, "encoding": encoding})
    return {"data": {"values": rows}, "transform": [{"flatten": parts}], "layer": layers}


def diagonal(spec: Spec, values: Sequence[float]) -> Spec:
    """The same chart, with a line where x is y, from the least of `values` to the largest."""
    at = spec["layer"][-1]["encoding"]
    line = {
        "data": {"values": [{"x": value, "y": value} for value in (min(values), max(values))]},
        "mark": {"type": "line", "style": "reference"},
        "encoding": {"x": at["x"], "y": at["y"]},
    }
    return {**spec, "layer": [line, *spec["layer"]]}


def bars(several: Sequence[Curve], x: str, y: str, *, fixed: Sequence[tuple[int, int]] = ()) -> Spec:
    """Counts at each x as bars from 0, one colour a curve; those to be told apart have different signs."""
    spec = curves(several, Axes(x, y, points=True, from_zero=True, fixed=fixed))
    steps = several[0].x
    gap = min([after - before for before, after in pairwise(steps)], default=1)
    share = 0.6 * gap / max(1, *steps, *(end for _, end in fixed))
    for layer in spec["layer"]:
        layer["encoding"]["x"] = {**layer["encoding"]["x"], "scale": {"zero": True, "nice": False}}
    bar = spec["layer"][-1]
    bar["mark"] = {"type": "bar", "orient": "vertical", "size": {"expr": f"max(1, min(14, {share} * width))"}}
    del bar["encoding"]["shape"]
    bar["encoding"]["y"] = {**bar["encoding"]["y"], "stack": None}
    return spec


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
            "fixed": {"color": ink, "opacity": 0.06},
            "band": {"opacity": 0.17},
            "raw": {"strokeWidth": 1, "opacity": 0.38},
            "quiet": {"color": grey, "strokeWidth": 1, "opacity": 0.6},
            "brought": {"color": ink, "strokeWidth": 3.5},
            "points": {"filled": True, "size": 70, "opacity": 0.85},
            "reader": {"filled": True, "size": 160, "opacity": 0},
            "error": {"strokeWidth": 1.6, "opacity": 0.75},
            "reference": {"color": ink, "strokeDash": [5, 4], "strokeWidth": 1.2},
            "reference-label": {"color": muted, "align": "left", "dy": 12, "fontSize": 12},
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


def _placed(values: Sequence[Value], log: bool) -> list[Value]:
    """The values that have a place on the axis; a gap for the others."""
    return [None if log and (value is None or value <= 0) else value for value in values]


def _axis(field: str, title: str, scale: Spec, values: Sequence[float]) -> Spec:
    """An axis; around a single value there is room, since Vega would draw that beside any tick."""
    if len(set(values)) == 1 and not (scale.get("zero") and values[0]):
        (value,) = set(values)
        room = (
            [value / 2, value * 2] if scale.get("type") == "log" else [value - abs(value) / 10, value + abs(value) / 10]
        )
        scale = {**scale, "domain": room if value else [-1, 1], "nice": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def _of(kind: str, mark: Spec, encoding: Spec) -> Spec:
    return {"transform": [{"filter": f"datum.kind === '{kind}'"}], "mark": mark, "encoding": encoding}
