"""What a smaller adapter would cost: the curve that `pedyra fit` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pedyra.report.chart import Curve, Spec, curves
from pedyra.report.figure import Figure, Panel, titled
from pedyra.report.run_folder import Run


def loss_against_parameters(runs: Sequence[Run]) -> Figure:
    """Loss against parameters, predicted and measured, one panel per run that was fitted."""
    panels = [Panel(titled(runs, run, "What a smaller adapter costs"), cost_curve(run.fit)) for run in runs if run.fit]
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


def cost_curve(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The chart of one fit, from the rows of its curve."""
    rows = [row for row in rows if row["measured_cost"] is not None and row["share"] < 1]
    x = [row["parameters"] for row in rows]
    measured = [row["measured_cost"] for row in rows]
    errors = [1.96 * row["standard_error"] for row in rows]
    low = [cost - error for cost, error in zip(measured, errors, strict=True)]
    high = [cost + error for cost, error in zip(measured, errors, strict=True)]
    predicted = [row["predicted_cost"] for row in rows]
    drawn = [Curve("measured", x, measured, low, high), Curve("predicted", x, predicted, predicted, predicted)]
    line_at = ("tolerance", round(rows[0]["tolerance"], 4)) if rows and rows[0].get("tolerance") is not None else None
    return curves(drawn, "parameters of the adapter", "rise of the loss", log_x=True, line_at=line_at)
