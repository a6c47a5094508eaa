"""By how much the loss rises with a smaller adapter: the curve that `pedyra fit` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pedyra.app.report.chart import Curve, Spec, curves, diagonal
from pedyra.app.report.figure import Figure, Panel, titled
from pedyra.app.report.run_folder import Run


def loss_against_parameters(runs: Sequence[Run]) -> Figure:
    """Loss against parameters, predicted and measured, one panel per run that was fitted."""
    panels = [
        Panel(titled(runs, run, "The loss with a smaller adapter"), increase_curve(run.fit)) for run in runs if run.fit
    ]
    chosen = [
        titled(runs, run, f"{row['parameters']:,} parameters ({row['share']:.0%})")
        for run in runs
        for row in run.fit
        if row.get("chosen")
    ]
    caption = (
        "How much the loss rises when only the most useful directions of the adapter stay: as predicted from "
        "gradients, and as measured in pairs with the whole adapter (band: 95 %). Below the line a size is within "
        "tolerance. " + (f"Taken: {'; '.join(chosen)}." if chosen else "")
    )
    return Figure("fit", "Size", "Loss against parameters", caption, panels, "the curve of a fit")


def increase_curve(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The chart of one fit, from the rows of its curve."""
    rows = [row for row in rows if row["measured_increase"] is not None and row["share"] < 1]
    x = [row["parameters"] for row in rows]
    predicted = [row["predicted_increase"] for row in rows]
    drawn = [_measured("measured", x, rows), Curve("predicted", x, predicted, predicted, predicted)]
    if tried := [row for row in rows if row.get("recovered_increase") is not None]:
        drawn.append(_measured("after recovery", [row["parameters"] for row in tried], tried, "recovered_"))
    line_at = ("tolerance", round(rows[0]["tolerance"], 4)) if rows and rows[0].get("tolerance") is not None else None
    return curves(drawn, "parameters of the adapter", "rise of the loss", log_x=True, line_at=line_at)


def predicted_against_measured(runs: Sequence[Run]) -> Figure:
    """Predicted against measured rise of the loss, one point per size of every run that was fitted."""
    fits = {run.label: run.fit for run in runs if run.fit}
    drawn = any(clear(rows) for rows in fits.values())
    panels = [Panel("Each size of a fit", calibration(fits))] if drawn else []
    caption = (
        "Is the prediction right? Each point is a size: by how much gradients alone say that the loss rises, and by "
        "how much it was measured to rise (bar: 95 %). On the dashed line both are equal; above it the prediction is "
        "too low. Sizes whose rise is not clear of its noise are left out."
    )
    return Figure("calibration", "Size", "Predicted and measured rise", caption, panels, "the curve of a fit")


def calibration(fits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Spec:
    """The chart of several fits: name -> the rows of its curve."""
    clear_of = {name: clear(rows) for name, rows in fits.items()}
    drawn = [_measured(name, [row["predicted_increase"] for row in rows], rows) for name, rows in clear_of.items()]
    spec = curves(drawn, "predicted rise of the loss", "measured rise", points=True, log_x=True, log_y=True)
    return diagonal(spec, [value for curve in drawn for value in (*curve.x, *curve.y) if value is not None])


def clear(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The sizes whose measured rise is above its noise, and whose predicted rise is above 0."""
    return [
        row
        for row in rows
        if row["measured_increase"] is not None
        and row["measured_increase"] > 1.96 * row["standard_error"]
        and row["predicted_increase"] > 0
    ]


def _measured(name: str, x: Sequence[float], rows: Sequence[Mapping[str, Any]], after: str = "") -> Curve:
    """The measured rises with their 95 % interval; `after` "recovered_", those after recovery."""
    keys = (f"{after or 'measured_'}increase", f"{after}standard_error")
    rise, error = ([row[key] for row in rows] for key in keys)
    low, high = ([r + sign * 1.96 * e for r, e in zip(rise, error, strict=True)] for sign in (-1, 1))
    return Curve(name, x, rise, low, high)
