"""By how much the loss rises with a smaller adapter: the curve that a fit measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pedyra.app.report.chart import Axes, Curve, Spec, curves
from pedyra.app.report.figure import Figure, Panel, titled
from pedyra.app.report.run_folder import Run


def increase_by_size(runs: Sequence[Run]) -> Figure:
    """Rise of the loss against parameters, predicted and measured, one panel per run that was fitted."""
    panels, found = [], []
    for run in runs:
        if run.curve:
            panels.append(Panel(titled(runs, run, "The loss with a smaller adapter"), increase_curve(run.curve)))
        if run.fit:
            found.append(titled(runs, run, _taken(run)))
    caption = (
        "How much the loss rises when only the most useful directions of the adapter stay: as predicted from "
        "gradients, and as measured on held-out rows, each time against the whole adapter (band: 95 %). Below the "
        f"dashed line, from which on the scale is logarithmic, a size is within tolerance. {' '.join(found)}"
    )
    return Figure("fit", "Size", "How small may the adapter be?", caption, panels)


def increase_curve(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The chart of one fit, from the rows of its curve."""
    smaller = sorted((row for row in rows if row["share"] < 1), key=lambda row: row["parameters"])
    x = [row["parameters"] for row in smaller]
    drawn = [
        *_measured("measured", smaller, "measured_increase", "standard_error"),
        Curve("predicted", x, [row["predicted_increase"] for row in smaller]),
        *_measured("after recovery", smaller, "recovered_increase", "recovered_standard_error"),
    ]
    limit = next((row["tolerance"] for row in rows if row.get("tolerance") is not None), None)
    line_at = None if limit is None else ("tolerance", float(f"{limit:.3g}"))
    axes = Axes("parameters of the adapter", "rise of the loss", log_x=True, bend=limit or None, line_at=line_at)
    return curves(drawn, axes)


def _measured(name: str, rows: Sequence[Mapping[str, Any]], value: str, error: str) -> list[Curve]:
    """`[the curve]` of the sizes that were measured so, with its 95 % interval; [] where none was."""
    rows = [row for row in rows if row.get(value) is not None and row.get(error) is not None]
    rises = [row[value] for row in rows]
    low, high = ([row[value] + sign * 1.96 * row[error] for row in rows] for sign in (-1, 1))
    return [Curve(name, [row["parameters"] for row in rows], rises, low, high)] if rows else []


def _taken(run: Run) -> str:
    """What was taken, what it does to the loss, and the metric of the task before and after; what is known of it."""
    fit = run.fit
    told = f"Taken: {fit['parameters']:,} parameters ({fit['share']:.0%} of the adapter)"
    if fit.get("measured_increase") is not None and fit.get("interval"):
        rise, low, high = (f"{value:+.2g}".replace("-", "−") for value in (fit["measured_increase"], *fit["interval"]))
        told += f"; the loss changes by {rise} ({low} to {high} with 95 % confidence)"
    if fit.get("tolerance") is not None:
        told += f", and {fit['tolerance']:.2g} is the tolerance"
    values = {which: each for which, each in (fit.get("metrics") or {}).items() if each}
    name = str(run.final.get("metric"))
    if any(name in each for each in values.values()):
        titles = {"base": "base model", "whole": "whole adapter", "smaller": "smaller adapter"}
        each = [f"{titles[which]} {values[which][name]:.4f}" for which in titles if name in values.get(which, {})]
        told += f"; {name} on the rows that prove it: {', '.join(each)}"
    return f"{told}."
