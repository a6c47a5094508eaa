"""Is the rank well spent? Effective rank and utilisation, distance from Theorem 3.1, rank against importance."""

from __future__ import annotations

from collections.abc import Sequence

from pedyra.report.chart import Chart, Figure, Series, Value
from pedyra.report.curves import STEP, Points, color, curve, curve_per_run, figure, mean, phases, signed, told_of
from pedyra.report.measures import importance_ranks, log_variance, mean_by_layer, spearman, utilisation
from pedyra.report.run_folder import Record, Run


def effective_rank(runs: Sequence[Run]) -> Figure | None:
    """Mean effective rank per layer and utilisation against the step (Fig. 1a)."""
    effective = curve_per_run(runs, lambda run: run.snapshots, _mean_effective_rank)
    used = curve_per_run(runs, lambda run: run.snapshots, _utilisation)
    panels = [
        Chart("Effective rank", STEP, "mean per layer", effective, from_zero=True, phases=phases(runs)),
        Chart("Utilisation", STEP, "effective rank / rank", used, from_zero=True, phases=phases(runs)),
    ]
    ends = [
        (mean_rank.name, f"{mean_rank.y[-1]:.2f} directions per layer, {share.y[-1]:.0%} of the ranks in use")
        for mean_rank, share in zip(effective, used, strict=True)
    ]
    caption = (
        "How many directions the updates really use, and which share of the allocated ranks that is. "
        f"At the end: {told_of(runs, ends)}."
    )
    return figure("effective-rank", "Capacity", "Effective rank and utilisation", caption, panels, "Fig. 1a")


def pareto_variance(runs: Sequence[Run]) -> Figure | None:
    """Log-variance over layers of G^(2/3) / r against the step (Fig. 5)."""
    found = [(index, variance_points(run)) for index, run in enumerate(runs)]
    series = [curve(runs[index].label, points, color(index)) for index, points in found if points]
    panel = Chart("Distance from the Pareto condition", STEP, "ln Var(G^(2/3) / r)", series, phases=phases(runs))
    ends = [(s.name, f"from {signed(s.y[0])} to {signed(s.y[-1])}") for s in series]
    caption = (
        "Natural logarithm of a variance over the layers: lower is closer to the condition of Theorem 3.1, ranks in "
        f"proportion to importance to the power 2/3, at which it would be −∞. First to last: {told_of(runs, ends)}."
    )
    return figure("variance", "Capacity", "Cross-layer log-variance", caption, [panel], "Fig. 5")


def rank_against_importance(runs: Sequence[Run]) -> Figure | None:
    """Mean rank against mean importance, one point per layer, one panel per run (Fig. 4b)."""
    panels, findings = [], []
    for run in runs:
        if not run.adjustments:
            continue
        panels.append(_scatter(run, run.label if len(runs) > 1 else "Layers by module type"))
        by_score, by_place = correlations(run)
        finding = f"ρ = {signed(by_score, '+')} with importance, {signed(by_place, '+')} with place"
        findings.append((run.label, f"{finding} ({len(run.layers)} layers)"))
    caption = (
        "Each point is a layer: its importance before (Eq. 7) and its rank after an adjustment, averaged over the "
        "adjustments. Spearman’s rank correlation of mean rank with mean importance and, as the paper has it, with the "
        f"mean place by importance (1 = most important, so full agreement is −1): {told_of(runs, findings)}."
    )
    return figure("spearman", "Capacity", "Mean rank against mean importance", caption, panels, "Fig. 4b")


def correlations(run: Run) -> tuple[Value, Value]:
    """Spearman of mean rank with mean importance, and with mean importance place; None where undefined."""
    names = [layer.name for layer in run.layers]
    ranks = mean_by_layer([record["ranks"] for record in run.adjustments])
    scores = mean_by_layer([record["layer_scores"] for record in run.adjustments])
    places = mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])
    mean_ranks = [ranks[name] for name in names]
    by_score = spearman(mean_ranks, [scores[name] for name in names])
    return by_score, spearman(mean_ranks, [places[name] for name in names])


def variance_points(run: Run) -> Points:
    """`(step, ln Var(G^(2/3) / r))`, each score against the ranks in force when it was taken."""
    values = {s["step"]: log_variance(s["layer_scores"], s["ranks"]) for s in run.snapshots if s.get("layer_scores")}
    before = run.start_ranks
    for adjustment in run.adjustments:
        values[adjustment["step"]] = log_variance(adjustment["layer_scores"], before)
        before = adjustment["ranks"]
    return sorted((step, value) for step, value in values.items() if value is not None)


def _scatter(run: Run, title: str) -> Chart:
    ranks = mean_by_layer([record["ranks"] for record in run.adjustments])
    scores = mean_by_layer([record["layer_scores"] for record in run.adjustments])
    series = []
    for index, kind in enumerate(dict.fromkeys(layer.type for layer in run.layers)):
        members = [layer for layer in run.layers if layer.type == kind]
        x, y = [scores[layer.name] for layer in members], [ranks[layer.name] for layer in members]
        names = [layer.short_name for layer in members]
        series.append(Series(kind, x, y, "points", color(index), labels=names))
    positive = all(value > 0 for value in scores.values())
    return Chart(title, "mean importance of the layer", "mean rank", series, log_x=positive, from_zero=True)


def _mean_effective_rank(snapshot: Record) -> Value:
    return mean((snapshot.get("effective_rank") or {}).values())


def _utilisation(snapshot: Record) -> Value:
    effective = snapshot.get("effective_rank")
    return utilisation(effective, snapshot["ranks"]) if effective else None
