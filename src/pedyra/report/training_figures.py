"""Loss and metric, the orthogonality term, gradient norms, parameters: figures of the training itself."""

from __future__ import annotations

from collections.abc import Sequence

from pedyra.report.chart import Chart, Figure
from pedyra.report.curves import (
    STEP,
    color,
    curve_per_run,
    figure,
    mean,
    measured,
    phases,
    smoothed_curves,
    spread,
    told_of,
)
from pedyra.report.run_folder import Record, Run

# What Trainer logs beside the metrics at an evaluation.
_BOOKKEEPING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def loss_and_metrics(runs: Sequence[Run]) -> Figure | None:
    """Training loss, evaluation loss and every evaluation metric against the step."""
    bands = phases(runs)
    losses = [(index, run, measured(run.metrics, lambda r: r.get("loss"))) for index, run in enumerate(runs)]
    training = [
        series for i, run, points in losses if points for series in smoothed_curves(run.label, points, color(i))
    ]
    panels = [Chart("Training loss", STEP, "loss", training, phases=bands)]
    for key in _evaluation_keys(runs):
        curves = curve_per_run(runs, lambda run: run.metrics, lambda r, key=key: r.get(key))
        name = key.removeprefix("eval_").replace("_", " ")
        title = "Held-out loss" if key == "eval_loss" else f"Held-out {name}"
        panels.append(Chart(title, STEP, name, curves, phases=bands))
    caption = (
        "Training loss: every logged value faint, its moving average (decay 0.9) in full."
        if any(series.faint for series in training)
        else "Training loss as logged."
    )
    if len(panels) > 1:
        caption += " Held-out loss and metric as evaluated during training."
    results = [(run.label, f"{run.final['metric']} {run.final['value']:.4g}") for run in runs if _has_result(run)]
    if results:
        caption += f" Final result: {told_of(runs, results)}."
    return figure("loss", "Training", "Loss and metric", caption, panels)


def orthogonality(runs: Sequence[Run]) -> Figure | None:
    """The orthogonality term: its mean over all factors and, for one run, A and B apart (Fig. 10)."""

    def pairs(record: Record) -> list[list[float]]:
        return list((record.get("orthogonality") or {}).values())

    overall = curve_per_run(runs, _snapshots, lambda record: mean(value for pair in pairs(record) for value in pair))
    panels = [Chart("Mean over all factors", STEP, "R", overall, log_y=True, phases=phases(runs))]
    caption = (
        "How far the factors are from orthonormal triples (Eq. 2), on a logarithmic scale; 0 is exactly orthonormal."
    )
    if len(runs) == 1:
        sides = [
            series
            for slot, name in enumerate("AB")
            for series in spread(name, runs[0].snapshots, lambda r, i=slot: [pair[i] for pair in pairs(r)], slot)
        ]
        panels.append(Chart("By factor", STEP, "R per layer", sides, log_y=True, phases=phases(runs)))
        caption += " By factor: median over the layers, band from first to third quartile."
    return figure("orthogonality", "Optimisation", "Orthogonality term", caption, panels, "Fig. 10")


def gradient_norms(runs: Sequence[Run]) -> Figure | None:
    """Gradient norms of A, E and B, one panel per run (Fig. 11)."""

    def norms(record: Record) -> list[list[float]]:
        return list((record.get("grad_norms") or {}).values())

    panels = []
    for run in runs:
        sides = [
            series
            for slot, name in enumerate("AEB")
            for series in spread(name, run.snapshots, lambda r, i=slot: [three[i] for three in norms(r)], slot)
        ]
        title = "Task gradient by part" if len(runs) == 1 else run.label
        panels.append(Chart(title, STEP, "gradient norm (Frobenius)", sides, log_y=True, phases=phases([run])))
    caption = (
        "Norm of the task gradient of the input factor A, the diagonal E and the output factor B: median over the "
        "layers, band from first to third quartile, logarithmic scale. Their shares are the weights of Eq. 5."
    )
    return figure("gradients", "Optimisation", "Gradient norms of A, E and B", caption, panels, "Fig. 11")


def parameters_and_rank(runs: Sequence[Run]) -> Figure | None:
    """Adapter parameters and total rank against the step, with the budget as a line."""
    budgets = [run.header["budget"] for run in runs if (run.header.get("budget") or {}).get("parameters")]
    reference = None
    if len({budget["parameters"] for budget in budgets}) == 1:
        # A budget of ranks holds no parameters fixed: then the line is where the run began.
        name = "budget" if all(budget.get("kind") == "parameters" for budget in budgets) else "start"
        reference = (name, budgets[0]["parameters"])
    parameters = curve_per_run(runs, _states, lambda record: record.get("parameters"), "step")
    total = curve_per_run(runs, _states, lambda record: sum(record["ranks"].values()), "step")
    panels = [
        Chart("Adapter parameters", STEP, "parameters", parameters, from_zero=True, reference=reference),
        Chart("Total rank", STEP, "sum of ranks", total, from_zero=True),
    ]
    caption = "What the adapters hold at each step. Ranks are physical: optimizer, gradients and disk hold the same."
    return figure("parameters", "Cost", "Parameters and total rank", caption, panels)


def _snapshots(run: Run) -> list[Record]:
    return run.snapshots


def _states(run: Run) -> list[Record]:
    return run.snapshots + run.adjustments


def _evaluation_keys(runs: Sequence[Run]) -> list[str]:
    """eval_loss first, then the metric the runs are judged by, then the others as first logged."""
    keys = dict.fromkeys(key for run in runs for record in run.metrics for key in record if key.startswith("eval_"))
    judged = {f"eval_{run.final.get('metric')}" for run in runs}
    found = [key for key in keys if key.removeprefix("eval_") not in _BOOKKEEPING]
    return sorted(found, key=lambda key: (key != "eval_loss", key not in judged))


def _has_result(run: Run) -> bool:
    return isinstance(run.final.get("value"), int | float)
