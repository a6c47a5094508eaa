"""Rows become charts of Altair. The page draws them with Vega, `images` draws them without a browser.

Names that come from a run are data here, never part of an expression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Chart = alt.Chart | alt.LayerChart
Row = dict[str, Any]
Value = float | None

# These are Okabe and Ito's colour-blind safe colours, darkened or lightened until each reads as a thin line.
PALETTE = {
    "light": ["#0068A8", "#C8500A", "#00805C", "#A8447E", "#94700A", "#4A8FBE", "#5B5BB0", "#6B6B6B"],
    "dark": ["#5EB5EE", "#FF9557", "#38C8A0", "#E79AC8", "#E8C04F", "#A6D3F5", "#B3B2F5", "#B0B0B0"],
}
GREY, CHANGED = "#78828c", "#C8500A"
MARKED = 12  # a curve of so few points shows each


@dataclass(frozen=True)
class Curve:
    """Draws `y` against `x`, with a bar from `low` to `high` where they are given."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    quiet: bool = False  # in grey, under the others

    def rows(self) -> list[Row]:
        """Make a row of each point that has a number."""
        columns = {"x": self.x, "y": self.y, "low": self.low, "high": self.high}
        columns = {key: values for key, values in columns.items() if values is not None}
        points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        kind = "quiet" if self.quiet else "drawn"
        return [{"name": self.name, "kind": kind, **point} for point in points if point["y"] is not None]


@dataclass(frozen=True)
class Axes:
    """Curves share these axes."""

    x: str  # title, with the unit
    y: str
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] | None = None  # the x axis has these labels alone
    linear_to: float | None = None  # the y axis is linear up to this distance from 0, and logarithmic beyond
    from_zero: bool = False  # the y axis includes 0
    reverse: bool = False  # the value 1 is at the top, for places in a ranking
    step: bool = False  # a value holds until the next
    line_at: tuple[str, float] | None = None  # name and value of a horizontal line
    ring: tuple[float, float] | None = None  # around this point


def curves(several: Sequence[Curve], axes: Axes) -> alt.LayerChart:
    """Draw curves with their bars over one pair of axes."""
    rows = [row for curve in several for row in curve.rows()]
    rows = [row for row in rows if (row["x"] > 0 or not axes.log_x) and (row["y"] > 0 or not axes.log_y)]
    x, y = _x(axes, rows), _y(axes, rows)
    foreground, background = ([curve for curve in several if curve.quiet is kind] for kind in (False, True))
    names = [curve.name for curve in foreground]
    legend = alt.Legend(values=names) if len(names) > 1 else None
    color = alt.Color("name:N", title=None, scale=alt.Scale(domain=names), legend=legend)
    who = alt.Tooltip("name:N", title=" ")
    line: dict[str, Any] = {"interpolate": "step-after" if axes.step else "linear"}
    layers = []
    if background:
        grey = _of("quiet").mark_line(color=GREY, strokeWidth=1, opacity=0.5, **line)
        layers.append(grey.encode(x, y, detail="name:N", tooltip=who))
    if any(curve.low for curve in foreground):
        bars = _of("drawn").transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.7)
        layers.append(bars.encode(x, _y(axes, rows, "low"), alt.Y2("high"), color))
    if foreground:
        few = max(len(curve.x) for curve in foreground) <= MARKED and not axes.step
        layers.append(_of("drawn").mark_line(point=few, **line).encode(x, y, color))
        values = [alt.Tooltip(f"{key}:Q", title=title, format=",.5~g") for key, title in (("x", axes.x), ("y", axes.y))]
        hover = _of("drawn").mark_point(filled=True, size=160, opacity=0)  # the pointer finds these
        layers.append(hover.encode(x, y, color, tooltip=[who, *values]))
    if axes.line_at:
        name, value = axes.line_at
        there = alt.Chart(alt.InlineData(values=[{"y": value, "text": f"{name} {value:,}"}]))
        layers.append(there.mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color=GREY).encode(y))
        words = there.mark_text(align="right", dy=-7, color=GREY)
        layers.append(words.encode(y, x=alt.value("width"), text="text:N"))
    if axes.ring:
        there = alt.Chart(alt.InlineData(values=[dict(zip("xy", axes.ring, strict=True))])).encode(x, y)
        layers.append(there.mark_point(shape="circle", filled=False, size=260, strokeWidth=2.5, opacity=1, color=GREY))
    return alt.LayerChart(layer=layers, data=alt.InlineData(values=rows))


def rank_map(
    cells: Sequence[Mapping[str, Any]],
    *,
    at: str = "adjustment",
    highest: float | None = None,
    x: str = "depth in the model (block)",
) -> alt.LayerChart:
    """Draw ranks as module type by depth, coloured by rank up to the `highest`, of the cells of `figures.map_cells`;
    the frame to draw is an expression, by default the parameter `adjustment`, and `x` says what their `depth` is."""
    darkest = highest or max([1, *(rank for cell in cells for rank in cell["ranks"])])
    number = "format(datum.rank, datum.rank % 1 ? '.1f' : 'd')"
    mark = "datum.change > 0 ? '▲' : datum.change < 0 ? '▼' : ''"
    axis = alt.Axis(ticks=False, domain=False, grid=False, labelAngle=0)
    base = alt.Chart(alt.InlineData(values=list(cells))).transform_calculate(
        rank=f"datum.ranks[{at}]", change=f"datum.changes[{at}]", label=f"{number} + ({mark})"
    )
    base = base.encode(
        x=alt.X("depth:N", sort=None, axis=axis, title=x),
        y=alt.Y("type:N", sort=None, axis=axis, title=None),
        tooltip=["type:N", "depth:N", "rank:N", "change:N"],
    )
    fill = alt.Color("rank:Q", scale=alt.Scale(domain=[0, darkest], scheme="blues"), title="rank")
    on_dark = alt.condition(f"datum.rank > {0.6 * darkest}", alt.value("white"), alt.value("#14202b"))
    changes = base.transform_filter("datum.change != 0")
    return alt.layer(
        base.mark_rect().encode(color=fill),
        changes.mark_rect(filled=False, color=CHANGED, strokeWidth=1.4),
        base.mark_text(fontSize=11).encode(text="label:N", color=on_dark),
    ).properties(width=alt.Step(30), height=alt.Step(24))


def theme(scheme: str) -> dict[str, Any]:
    """Return Vega-Lite's config for "light" or "dark"."""
    light, dark = ("#fcfcfa", "#1a1e23", "#5a636d", "#e8eaea"), ("#13161a", "#e5e8ea", "#9ca6af", "#262c32")
    paper, strong, ink, grid = dark if scheme == "dark" else light
    words = {"labelColor": ink, "titleColor": ink, "titleFontWeight": "normal"}
    words |= {"labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": paper,
        "font": 'system-ui, "Liberation Sans", Arial, sans-serif',
        "view": {"stroke": None},
        "title": {"color": strong, "fontSize": 13, "anchor": "start", "offset": 10},
        "axis": {**words, "gridColor": grid, "domainColor": ink, "tickColor": ink, "tickCount": 5},
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False},
        # The symbols are opaque, though the bars of a curve are not.
        "legend": {
            **words,
            "orient": "top",
            "columns": 3,
            "labelLimit": 220,
            "gradientLength": 120,
            "symbolOpacity": 1,
        },
        "range": {"category": PALETTE[scheme]},
    }


def spec_of(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """Write the chart as Vega-Lite, without a theme: numbers have five significant digits, and NaN is None."""
    with alt.data_transformers.enable(consolidate_datasets=False):
        spec = chart.to_dict(validate=False)
    return {key: _plain(value) for key, value in spec.items() if key not in ("$schema", "config")}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _of(kind: str) -> alt.Chart:
    return alt.Chart().transform_filter(alt.FieldEqualPredicate(field="kind", equal=kind))


def _x(axes: Axes, rows: Sequence[Row]) -> alt.X:
    scale = {"type": "log", "nice": False, "padding": 20} if axes.log_x else {"zero": True, "nice": False}
    axis = _ticks(axes.x_ticks, "d") if axes.x_ticks else alt.Undefined
    return alt.X("x:Q", title=axes.x, axis=axis, scale=_scale(scale, [row["x"] for row in rows]))


def _y(axes: Axes, rows: Sequence[Row], field: str = "y") -> alt.Y:
    values = [row[key] for row in rows for key in ("y", "low", "high") if row.get(key) is not None]
    values += [axes.line_at[1]] if axes.line_at else []
    if axes.linear_to:
        far = max([axes.linear_to, *map(abs, values)])
        decades = math.ceil(math.log10(far / axes.linear_to))
        ticks = [axes.linear_to * part * 10**power for power in range(decades + 1) for part in (1, 2, 5)]
        ticks = [tick for tick in ticks if tick <= far]
        ticks = sorted([*(-tick for tick in ticks if -tick >= min(values)), 0, *ticks])
        scale = alt.Scale(type="symlog", constant=axes.linear_to, nice=False, padding=8)
        return alt.Y(f"{field}:Q", title=axes.y, scale=scale, axis=_ticks(ticks, ".2~g"))
    whole = axes.from_zero or axes.reverse
    scale = {"zero": axes.from_zero, "reverse": axes.reverse, "nice": not axes.reverse, "padding": 0 if whole else 4}
    if axes.log_y:
        scale = {"type": "log", "nice": False, "padding": 8}
    return alt.Y(f"{field}:Q", title=axes.y, scale=_scale(scale, values))


def _ticks(values: Sequence[float], format: str) -> alt.Axis:
    """Label these values alone, and, where there is room, all of them: Vega thins them to the count of the theme."""
    return alt.Axis(values=[*values], tickCount=len(values), labelExpr=f"format(datum.value, '{format}')")


def _scale(scale: Row, values: Sequence[float]) -> alt.Scale:
    """Leave room around a single value, which Vega would draw beside any tick."""
    if len(set(values)) == 1 and not (scale.get("zero") and values[0]):
        value = values[0]
        low, high = value - abs(value) / 10, value + abs(value) / 10
        if scale.get("type") == "log":
            low, high = value / 2, value * 2
        scale = {**scale, "domain": [low, high] if value else [-1, 1], "nice": False}
    return alt.Scale(**scale)
