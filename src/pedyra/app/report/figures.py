"""The figures of a report, in the order of the page: a run's records -> charts, and the sentences under them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pedyra.app.report.measures as measures
import pedyra.app.report.rank_figures as rank_figures
from pedyra.app.report.chart import Axes, Curve, Value, curves
from pedyra.app.report.figure import (
    Figure,
    Panel,
    curve_of,
    follows_importance,
    last_values,
    mean,
    panel,
    per_run,
    points_of,
    spreads,
    titled,
)
from pedyra.app.report.fit_figure import increase_by_size
from pedyra.app.report.run_folder import Record, Run

SMOOTH_FROM = 40  # points; below that a moving average hides more than it shows
# What Trainer logs beside the metrics at an evaluation.
_BOOKKEEPING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def make_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure that the runs have data for."""
    return [figure for figure in (build(runs) for build in BUILDERS) if figure.panels]


def loss_and_metrics(runs: Sequence[Run]) -> Figure:
    """Training loss, and evaluation loss and the metric a run is judged by, against the step."""
    drawn, raw = [], []
    for run in runs:
        x, y = points_of(run.metrics, lambda record: record.get("loss"))
        if len(x) >= SMOOTH_FROM:
            raw += [replace(curve, kind="raw") for curve in curve_of(run.label, x, y)]
            y = measures.smoothed(y)
        drawn += curve_of(run.label, x, y)
    panels = panel("Training loss", [*drawn, *raw], "loss", runs)
    for key in _evaluation_keys(runs):
        name = key.removeprefix("eval_").replace("_", " ")
        each = per_run(runs, lambda run: run.metrics, lambda record, key=key: record.get(key))
        panels += panel(f"Held-out {name}", each, name, runs)
    results = [
        titled(runs, run, f"{run.final['metric']} {run.final['value']:.4g}")
        for run in runs
        if isinstance(run.final.get("value"), int | float)
    ]
    caption = (
        "How well the model fits: the loss on the rows it trains on"
        + (" (faint: as logged; full: moving average, decay 0.9)" if raw else "")
        + ", and loss and metric on rows it never trains on. "
        + (f"Final result: {'; '.join(results)}." if results else "")
    )
    return Figure("loss", "Training", "Loss and metric", caption, panels)


def effective_rank(runs: Sequence[Run]) -> Figure:
    """Mean effective rank per layer and utilisation against the step (Fig. 1a)."""

    def used(record: Record) -> Value:
        effective = record.get("effective_rank")
        return measures.utilisation(effective, record["ranks"]) if effective else None

    each = per_run(runs, _snapshots, lambda record: mean((record.get("effective_rank") or {}).values()))
    share = per_run(runs, _snapshots, used)
    caption = (
        "How many directions the layers really use, and which share of their ranks that is. The effective rank of an "
        "update is exp(−Σ p ln p), p being its singular values over their sum (Roy and Vetterli, 2007): 1 for a single "
        "direction, r for r equally strong ones, 0 for no update yet. Utilisation is the sum of the effective ranks "
        f"over the sum of the ranks. {last_values(runs, share, '{:.0%} used')}"
    )
    panels = panel("Effective rank", each, "mean over the layers", runs, from_zero=True)
    panels += panel("Utilisation", share, "effective rank / rank", runs, from_zero=True)
    title = "How much of the ranks is used"
    return Figure("effective-rank", "Capacity", title, caption, panels)


def pareto_variance(runs: Sequence[Run]) -> Figure:
    """Log-variance over layers of G^(2/3) / r against the step (Fig. 5)."""
    followed = [run for run in runs if follows_importance(run)]
    each = per_run(followed, _snapshots, lambda record: record.get("two_thirds_log_variance"))
    caption = (
        "How far the ranks are from those that the paper proves best, in proportion to importance to the power 2/3: "
        "ln of the variance of G^(2/3) / r over the layers (G: importance, Eq. 7 of the paper; r: rank). Lower is "
        "nearer. " + last_values(runs, each, "{:.2f}")
    )
    panels = panel("Distance from the best proportion", each, "ln Var(G^(2/3) / r)", runs)
    return Figure("variance", "Capacity", "Are ranks where importance is?", caption, panels)


def rank_against_importance(runs: Sequence[Run]) -> Figure:
    """Mean rank against mean importance, one point per layer, one panel per run (Fig. 4b)."""
    panels, findings = [], []
    for run in filter(follows_importance, runs):
        ranks = measures.mean_by_layer([record["ranks"] for record in run.adjustments])
        scores = measures.mean_by_layer([record["layer_scores"] for record in run.adjustments])
        series = [
            Curve(t, [scores[i.name] for i in each], [ranks[i.name] for i in each], labels=[i.short_name for i in each])
            for t, each in rank_figures.by_type(run.layers).items()
        ]
        log = all(score > 0 for score in scores.values())
        axes = Axes("mean importance of the layer", "mean rank", log_x=log, from_zero=True, points=True)
        panels.append(Panel(titled(runs, run, "Layers by module type"), curves(series, axes)))
        rho = measures.spearman([ranks[name] for name in scores], list(scores.values()))
        if rho is not None:
            findings.append(titled(runs, run, f"ρ = {rho:+.2f} over {len(run.layers)} layers.".replace("-", "−")))
    caption = (
        "Each point is a layer: its importance (Eq. 7 of the paper) and its rank, over the adjustments. If ranks went "
        f"to the important layers, Spearman’s rank correlation ρ is near +1. {' '.join(findings)}"
    )
    return Figure("spearman", "Capacity", "Mean rank against mean importance", caption, panels)


def orthogonality(runs: Sequence[Run]) -> Figure:
    """The orthogonality term: its mean over all factors and, for one run, A and B apart (Fig. 10)."""

    def pairs(record: Record) -> list[list[float]]:
        return list((record.get("orthogonality") or {}).values())

    held = [run for run in runs if (run.header.get("config") or {}).get("orth_weight")]
    each = per_run(held, _snapshots, lambda record: mean(value for pair in pairs(record) for value in pair))
    panels = panel("Mean over all factors", each, "distance from it", runs, log_y=True)
    if held and len(runs) == 1:
        sides = spreads(runs[0], "AB", pairs)
        panels += panel("By factor, over the layers", sides, "distance of a layer", runs, names=list("AB"), log_y=True)
    caption = (
        "How far the directions of a layer are from being perpendicular and of length one: ‖AAᵀ − I‖ and ‖BᵀB − I‖. A "
        "term of the loss (Eq. 2 of the paper) pulls them towards 0, so that each direction can be judged by itself; "
        "curves that stay flat say that the task pulls as hard. Logarithmic scale. By factor: median over the layers, "
        "band from first to third quartile."
    )
    return Figure("orthogonality", "Optimisation", "Are directions held apart?", caption, panels)


def gradient_norms(runs: Sequence[Run]) -> Figure:
    """Gradient norms of A, E and B, one panel per run (Fig. 11)."""
    panels = []
    for run in runs:
        sides = spreads(run, "AEB", lambda record: list((record.get("grad_norms") or {}).values()))
        title, y = titled(runs, run, "Task gradient by part"), "gradient norm (Frobenius)"
        panels += panel(title, sides, y, [run], names=list("AEB"), log_y=True)
    caption = (
        "How strongly the task pulls at the three parts of a layer’s update: the input factor A, the weights E and the "
        "output factor B. Median over the layers, band from first to third quartile, logarithmic scale."
    )
    return Figure("gradients", "Optimisation", "Gradient norms of A, E and B", caption, panels)


def parameters_and_rank(runs: Sequence[Run]) -> Figure:
    """Adapter parameters and total rank against the step, with the budget as a line."""
    budgets = {
        (b.get("kind"), b["parameters"]) for run in runs if (b := run.header.get("budget") or {}).get("parameters")
    }
    line_at = None
    if len({parameters for _, parameters in budgets}) == 1:
        # A budget of ranks holds no parameters fixed: then the line is where the run began.
        name = "budget" if {kind for kind, _ in budgets} == {"parameters"} else "start"
        line_at = (name, next(iter(budgets))[1])
    held = per_run(runs, _states, lambda record: record.get("parameters"))
    total = per_run(runs, _states, lambda record: sum(record["ranks"].values()))
    panels = panel("Adapter parameters", held, "parameters", runs, from_zero=True, step=True, line_at=line_at)
    panels += panel("Total rank", total, "sum of the ranks", runs, from_zero=True, step=True)
    caption = (
        "How large the adapter is at each step. The ranks are real at all times: memory, optimizer and disk hold this "
        "many parameters and no more."
    )
    return Figure("parameters", "Cost", "Parameters and total rank", caption, panels)


BUILDERS: tuple[Callable[[Sequence[Run]], Figure], ...] = (
    increase_by_size,
    rank_figures.ranks_over_steps,
    rank_figures.history,
    rank_figures.moves,
    loss_and_metrics,
    effective_rank,
    pareto_variance,
    rank_against_importance,
    orthogonality,
    gradient_norms,
    parameters_and_rank,
)


def _snapshots(run: Run) -> list[Record]:
    return run.snapshots


def _states(run: Run) -> list[Record]:
    return sorted(run.snapshots + run.adjustments, key=lambda record: record["step"])


def _evaluation_keys(runs: Sequence[Run]) -> list[str]:
    """eval_loss, then the metrics the runs are judged by; of runs that are not finished all that were logged."""
    logged = dict.fromkeys(key for run in runs for record in run.metrics for key in record if key.startswith("eval_"))
    judged = dict.fromkeys(f"eval_{run.final['metric']}" for run in runs if run.final.get("metric"))
    named = judged or [key for key in logged if key.removeprefix("eval_") not in _BOOKKEEPING]
    return ["eval_loss", *(key for key in named if key != "eval_loss")]
