"""What a figure is, and the steps from records to curves that all figures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pedyra.app.report.chart import Axes, Curve, Spec, Value, curves
from pedyra.app.report.measures import quartiles, thinned
from pedyra.app.report.run_folder import Record, Run

STEP = "training step"
Measure = Callable[[Record], Any]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    spec: Spec
    values: Mapping[str, Any] = field(default_factory=dict)  # what the reader sets: parameter -> its first value
    frames: Sequence[str] = ()  # what the slider of `adjustment` says at each of its places
    stills: Sequence[tuple[str, Spec]] = ()  # title and chart of each image that stands for the slider in a file


@dataclass(frozen=True)
class Figure:
    """One numbered figure: panels, and a caption that says in plain words what is seen."""

    id: str
    section: str
    title: str
    caption: str
    panels: Sequence[Panel]  # none where no run recorded what it shows
    layers: Sequence[str] = ()  # of which the reader may bring out one


def follows_importance(run: Run) -> bool:
    """Whether ranks go where the layers' importance (Eq. 7) is, so that comparing the two tells something."""
    return bool(run.adjustments) and run.recipe.get("method") in ("pedyra", "prune", "expand")


def adjusted(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.adjustments]


def titled(runs: Sequence[Run], run: Run, text: str) -> str:
    """The text, after the run's label where there are several."""
    return text if len(runs) == 1 else f"{run.label}: {text}"


def panel(title: str, drawn: Sequence[Curve], y: str, runs: Sequence[Run], names: Sequence[str] = (), **options: Any):
    """`[the panel]` of these curves over the steps, one colour a run unless `names` are given; [] for no curves."""
    names = names or [run.label for run in runs]
    return [Panel(title, curves(drawn, Axes(STEP, y, **options), names))] if drawn else []


def fixed(run: Run) -> list[tuple[int, int]]:
    """The stretches before the first and after the last adjustment."""
    schedule = run.header.get("schedule") or {}
    if not schedule.get("adjustments") or not schedule.get("total_steps"):
        return []
    return [(0, schedule["adjustments"][0]), (schedule["adjustments"][-1], schedule["total_steps"])]


def mean(values: Iterable[Value]) -> Value:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def points_of(records: Iterable[Record], measure: Measure) -> tuple[list[int], list[float]]:
    """Steps and finite measures of the records that have one, in order, the last of a step."""
    points = {}
    for record in records:
        value = measure(record)
        if isinstance(value, int | float) and math.isfinite(value):
            points[record["step"]] = value
    return list(points), list(points.values())


def curve_of(name: str, x: Sequence[float], y: Sequence[float]) -> list[Curve]:
    """`[the curve]`, thinned to what a page can show; [] for no points."""
    kept = thinned(len(x))
    return [Curve(name, [x[i] for i in kept], [y[i] for i in kept])] if kept else []


def per_run(runs: Sequence[Run], records: Callable[[Run], list[Record]], measure: Measure) -> list[Curve]:
    """One curve for every run that recorded the measure."""
    return [curve for run in runs for curve in curve_of(run.label, *points_of(records(run), measure))]


def spreads(run: Run, names: str, values: Callable[[Record], list[list[float]]]) -> list[Curve]:
    """A curve a name: the median over the layers, its band from first to third quartile. `values` has a row a layer."""
    result = []
    for i, name in enumerate(names):
        found = [(record["step"], quartiles(row[i] for row in values(record))) for record in run.snapshots]
        found = [(step, three) for step, three in found if three[1] is not None]
        found = [found[k] for k in thinned(len(found))]
        if found:
            low, middle, high = zip(*(three for _, three in found), strict=True)
            result.append(Curve(name, [step for step, _ in found], middle, low, high))
    return result


def last_values(runs: Sequence[Run], drawn: Sequence[Curve], form: str) -> str:
    """ "At the end: ..." with the last value of each curve; nothing where none is drawn."""
    told = [form.format(c.y[-1]).replace("-", "−") + (f" ({c.name})" if len(runs) > 1 else "") for c in drawn]
    return f"At the end: {', '.join(told)}." if told else ""
