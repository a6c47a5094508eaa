"""From a run's records to curves: the steps every figure over training shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pedyra.report.chart import PALETTE, Chart, Figure, Phase, RankMap, Series, Value
from pedyra.report.measures import quartiles, smoothed, thinned
from pedyra.report.run_folder import Record, Run

STEP = "training step"
SMOOTH_FROM = 40  # points; below that a moving average hides more than it shows

Points = list[tuple[int, float]]


def color(index: int) -> int:
    """The palette slot of the index-th run; a ninth run begins again."""
    return index % len(PALETTE["light"])


def phases(runs: Sequence[Run]) -> list[Phase]:
    """The stretches before the first and after the last adjustment, if all runs share them."""
    schedules = [run.header.get("schedule") or {} for run in runs]
    if not all(s.get("adjustments") and s.get("total_steps") for s in schedules):
        return []
    spans = {(s["adjustments"][0], s["adjustments"][-1], s["total_steps"]) for s in schedules}
    if len(spans) > 1:
        return []
    first, last, end = spans.pop()
    return [Phase(0, first), Phase(last, end)]


def measured(records: Iterable[Record], measure: Callable[[Record], Any]) -> Points:
    """`(step, measure)` of each record that has it as a finite number, in order of step, the last of a step."""
    points = {}
    for record in records:
        value = measure(record)
        if isinstance(value, int | float) and math.isfinite(value):
            points[record["step"]] = value
    return sorted(points.items())


def curve(name: str, points: Points, slot: int | None, style: Any = "line", faint: bool = False) -> Series:
    kept = [points[index] for index in thinned(len(points))]
    return Series(name, [x for x, _ in kept], [y for _, y in kept], style, slot, faint=faint)


def curve_per_run(
    runs: Sequence[Run], records: Callable[[Run], list[Record]], measure: Callable[[Record], Any], style: Any = "line"
) -> list[Series]:
    """One curve for every run that recorded the measure."""
    found = [(index, measured(records(run), measure)) for index, run in enumerate(runs)]
    return [curve(runs[index].label, points, color(index), style) for index, points in found if points]


def smoothed_curves(name: str, points: Points, slot: int) -> list[Series]:
    """The points, faint, under their moving average; a short series as it is."""
    if len(points) < SMOOTH_FROM:
        return [curve(name, points, slot)]
    average = list(zip([x for x, _ in points], smoothed([y for _, y in points]), strict=True))
    return [curve(f"{name}, as logged", points, slot, faint=True), curve(name, average, slot)]


def spread(name: str, records: list[Record], values: Callable[[Record], list[float]], slot: int) -> list[Series]:
    """Median over layers as a curve, first to third quartile as its band; nothing if nothing was recorded."""
    points = [(record["step"], quartiles(values(record))) for record in records]
    points = [(step, three) for step, three in points if three[1] is not None]
    if not points:
        return []
    kept = [points[index] for index in thinned(len(points))]
    low, middle, high = zip(*(three for _, three in kept), strict=True)
    return [Series(name, [step for step, _ in kept], middle, color=slot, low=low, high=high)]


def mean(values: Iterable[Value]) -> Value:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def signed(value: Value, sign: str = "") -> str:
    """Two decimals with a typographic minus; sign "+" shows a plus as well."""
    return "undefined" if value is None else f"{value:{sign}.2f}".replace("-", "−")


def told_of(runs: Sequence[Run], findings: Iterable[tuple[str, str]]) -> str:
    """`(label, finding)` pairs as one clause; a lone run needs no label."""
    return "; ".join(finding if len(runs) == 1 else f"{label} {finding}" for label, finding in findings)


def listed(parts: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def figure(
    name: str,
    section: str,
    title: str,
    caption: str,
    panels: Sequence[Chart | RankMap],
    paper: str | None = None,
    highlight: bool = False,
) -> Figure | None:
    """The figure with those of its panels that have something to draw, or None."""
    drawn = [panel for panel in panels if isinstance(panel, RankMap) or panel.series]
    return Figure(name, section, title, caption, drawn, paper, highlight) if drawn else None
