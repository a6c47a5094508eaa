"""The figures of a report, in the order of the page: a run's records -> charts, and the sentences under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from pedyra.app.report import measures
from pedyra.app.report.chart import Axes, Curve, Spec, curves, rank_map
from pedyra.app.report.records import Layer, Record, RunRecords

STEP = "training step"
SMOOTH_FROM = 40  # points; below that a moving average hides more than it shows
SHOWN = 3  # layers in colour at each end of the ranking by change of rank
FOLLOW_IMPORTANCE = ("pedyra", "prune", "expand")
"""Methods whose ranks go where the layers' importance (Eq. 7) is, so that comparing the two tells something."""
# What Trainer logs beside the metrics at an evaluation.
_BOOKKEEPING = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
Runs = Sequence[RunRecords]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    spec: Spec
    frames: Sequence[str] = ()  # what the slider of the parameter `adjustment` says at each of its places
    stills: Sequence[tuple[str, Spec]] = ()  # title and chart of each image that stands for the slider in a file


@dataclass(frozen=True)
class Figure:
    """One numbered figure: panels, and a caption that says in plain words what is seen."""

    id: str
    section: str
    title: str
    caption: str
    panels: Sequence[Panel]  # none where no run recorded what it shows


def make_figures(runs: Runs) -> list[Figure]:
    """Every figure that the runs have data for."""
    builders: tuple[Callable[[Runs], Figure], ...] = (
        increase_by_size,
        rank_of_every_layer,
        history,
        rank_by_type,
        loss_and_metrics,
        effective_rank,
        rank_against_importance,
        parameters_and_rank,
    )
    return [figure for figure in (build(runs) for build in builders) if figure.panels]


# How small the adapter may be.


def increase_by_size(runs: Runs) -> Figure:
    """Rise of the loss against parameters, predicted and measured, one panel per run that was fitted."""
    title = "The loss with a smaller adapter"
    panels = [Panel(_titled(runs, run, title), increase_curve(run.curve)) for run in runs if run.curve]
    caption = (
        "How much the loss rises when only the most useful directions of the adapter stay: as predicted from "
        "gradients, and as measured on held-out rows, each time against the whole adapter (band: 95 %). Below the "
        "dashed line, from which on the scale is logarithmic, a size is within tolerance. "
        + " ".join(_titled(runs, run, _taken(run)) for run in runs if run.fit)
    )
    return Figure("fit", "Size", "How small may the adapter be?", caption, panels)


def increase_curve(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The chart of one fit, from the rows of its curve."""
    smaller = sorted((row for row in rows if row["share"] < 1), key=lambda row: row["parameters"])
    sizes = [row["parameters"] for row in smaller]
    drawn = [
        *_measured("measured for the choice", _of(smaller, "choice"), "measured_increase", "standard_error"),
        *_measured("measured for the proof", _of(smaller, "proof"), "measured_increase", "standard_error"),
        Curve("predicted", sizes, [row["predicted_increase"] for row in smaller]),
        *_measured("after recovery", smaller, "recovered_increase", "recovered_standard_error"),
    ]
    limit = next((row["tolerance"] for row in rows if row.get("tolerance") is not None), None)
    line_at = None if limit is None else ("tolerance", float(f"{limit:.3g}"))
    axes = Axes("parameters of the adapter", "rise of the loss", log_x=True, linear_to=limit or None, line_at=line_at)
    return curves(drawn, axes)


def _of(rows: Sequence[Mapping[str, Any]], which: str) -> list[Mapping[str, Any]]:
    """The sizes that were measured on these rows: two sets of rows differ by their noise, and make two curves."""
    return [row for row in rows if row.get("rows", "choice") == which]


def _measured(name: str, rows: Sequence[Mapping[str, Any]], value: str, error: str) -> list[Curve]:
    """`[the curve]` of the sizes that were measured so, with its 95 % interval; [] where none was."""
    rows = [row for row in rows if row.get(value) is not None and row.get(error) is not None]
    low, high = ([row[value] + sign * 1.96 * row[error] for row in rows] for sign in (-1, 1))
    sizes, increases = [row["parameters"] for row in rows], [row[value] for row in rows]
    return [Curve(name, sizes, increases, low, high)] if rows else []


def _taken(run: RunRecords) -> str:
    """What was taken, what it does to the loss, and the metric of the task before and after; what is known of it."""
    fit = run.fit
    told = f"Taken: {fit['parameters']:,} parameters ({fit['share']:.0%} of the adapter)"
    if fit.get("measured_increase") is not None and fit.get("interval"):
        rise, low, high = (_signed(value, ".2g") for value in (fit["measured_increase"], *fit["interval"]))
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


# Where the ranks are, and how they got there.


def rank_of_every_layer(runs: Runs) -> Figure:
    """Ranks as module type by depth, one frame per adjustment (Fig. 7 over time)."""
    caption = (
        "Each cell is one adapted layer of the model and shows its rank, that is how many directions it may learn; "
        "the stronger the colour, the higher. The slider goes through the adjustments; ▲ gained ranks, ▼ lost some."
    )
    panels = [_map(run, _titled(runs, run, "Module type by depth in the model")) for run in runs if run.layers]
    return Figure("map", "Ranks", "Rank of every layer", caption, panels)


def _map(run: RunRecords, title: str) -> Panel:
    cells = map_cells(run, [run.start_ranks, *(record["ranks"] for record in run.adjustments)])
    told = [f"Start: {_total(run.start_ranks, run.header.get('budget'))}"]
    for number, record in enumerate(run.adjustments, start=1):
        moved = f"{len(record['pruned'])} pruned, {sum(record['added'].values())} added"
        where = f"Adjustment {number} of {len(run.adjustments)}, step {record['step']:,}"
        told.append(f"{where}: {moved}; {_total(record['ranks'], record)}")
    last = len(told) - 1
    stills = [(f"{title}, start", rank_map(cells, at="0")), (f"{title}, end", rank_map(cells, at=str(last)))]
    return Panel(title, rank_map(cells), told, stills if last else stills[:1])


def map_cells(run: RunRecords, states: Sequence[Mapping[str, int]]) -> list[Spec]:
    """The cells of `rank_map`, a frame a state; layers at one place share a cell, what is outside of blocks is last."""
    places: dict[tuple[str, str], list[str]] = {}
    for layer in sorted(run.layers, key=lambda layer: (layer.depth is None, layer.depth or 0)):
        places.setdefault((layer.type, "–" if layer.depth is None else str(layer.depth)), []).append(layer.name)
    cells = []
    for (kind, depth), names in places.items():
        totals = [sum(state[name] for name in names) for state in states]
        changes = [0, *(after - before for before, after in pairwise(totals))]
        cells.append(
            {"type": kind, "depth": depth, "ranks": [total / len(names) for total in totals], "changes": changes}
        )
    return cells


def _total(ranks: Mapping[str, int], record: Record | None) -> str:
    parameters = (record or {}).get("parameters")
    return f"total rank {sum(ranks.values()):,}" + (f", {parameters:,} parameters" if parameters else "")


def history(runs: Runs) -> Figure:
    """Rank and place by importance of every layer, two panels per run (Fig. 3)."""
    panels, findings = [], []
    for run in _adjusted(runs):
        findings.append(_titled(runs, run, _changes(run)))
        panels += [replace(panel, title=_titled(runs, run, panel.title)) for panel in history_panels(run)]
    caption = (
        "One line a layer: its rank, and its place among all layers by importance, the mean of the scores by which the "
        "method ranks its directions. In colour the layers whose rank changed most; the pointer names the others. "
        + " ".join(findings)
    )
    return Figure("history", "Ranks", "Rank and importance of each layer over time", caption, panels)


def history_panels(run: RunRecords) -> list[Panel]:
    """Rank and place by importance of every layer."""
    steps, states = _states(run)
    at = [record["step"] for record in run.adjustments]
    places = [measures.importance_ranks(record["layer_scores"]) for record in run.adjustments]
    return [
        Panel("Rank", _by_layer(run, steps, states, Axes(STEP, "rank", step=True, from_zero=True))),
        Panel(
            "Place by importance", _by_layer(run, at, places, Axes(STEP, "place (1 = most important)", reverse=True))
        ),
    ]


def _by_layer(run: RunRecords, steps: Sequence[int], values: Sequence[Mapping[str, Any]], axes: Axes) -> Spec:
    """A line a layer, in colour those whose rank changed most."""
    shown = notable(run)
    drawn = [
        Curve(
            layer.short_name,
            steps,
            [value[layer.name] for value in values],
            kind="drawn" if layer in shown else "quiet",
        )
        for layer in (*shown, *(layer for layer in run.layers if layer not in shown))
    ]
    return curves(drawn, axes)


def notable(run: RunRecords) -> list[Layer]:
    """The layers that gained most, then those that lost most: at most `SHOWN` each, only layers that changed."""
    change = {layer.name: run.final_ranks[layer.name] - layer.rank for layer in run.layers}
    by_change = sorted(run.layers, key=lambda layer: -change[layer.name])
    gained = [layer for layer in by_change[:SHOWN] if change[layer.name] > 0]
    return gained + [layer for layer in by_change[-SHOWN:] if change[layer.name] < 0]


def _changes(run: RunRecords) -> str:
    """The layers whose rank changed most, in words."""
    parts = []
    for verb, sign in (("Gained", 1), ("Lost", -1)):
        moved = [(layer, run.final_ranks[layer.name]) for layer in notable(run)]
        told = [f"{layer.short_name} ({layer.rank} → {end})" for layer, end in moved if sign * (end - layer.rank) > 0]
        parts += [f"{verb} most: {', '.join(told)}."] if told else []
    return " ".join(parts) or "No layer changed its rank."


def rank_by_type(runs: Runs) -> Figure:
    """The mean rank of each type of layer, per run."""
    panels = []
    for run in _adjusted(runs):
        steps, states = _states(run)
        means = [
            Curve(kind, steps, [fmean(state[layer.name] for layer in layers) for state in states])
            for kind, layers in _by_type(run.layers).items()
        ]
        spec = curves(means, Axes(STEP, "mean rank", step=True, from_zero=True))
        panels.append(Panel(_titled(runs, run, "Mean rank by module type"), spec))
    caption = "What the adjustments made of each kind of layer: the mean of the ranks of its layers in all blocks."
    return Figure("types", "Ranks", "Which kinds of layers gain ranks", caption, panels)


def _by_type(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Module type -> its layers, in the order of the model."""
    types: dict[str, list[Layer]] = {}
    for layer in layers:
        types.setdefault(layer.type, []).append(layer)
    return types


def _states(run: RunRecords) -> tuple[list[int], list[Mapping[str, int]]]:
    """The ranks at step 0, after each adjustment and, unchanged, at the end of the schedule."""
    steps = [0, *(record["step"] for record in run.adjustments)]
    states = [run.start_ranks, *(record["ranks"] for record in run.adjustments)]
    end = (run.header.get("schedule") or {}).get("total_steps") or steps[-1]
    return ([*steps, end], [*states, states[-1]]) if end > steps[-1] else (steps, states)


# How it trained.


def loss_and_metrics(runs: Runs) -> Figure:
    """Training loss, and evaluation loss and the metric a run is judged by, against the step."""
    drawn = []
    for run in runs:
        x, y = _points(run.metrics, lambda record: record.get("loss"))
        if len(x) >= SMOOTH_FROM:
            drawn += [replace(curve, kind="raw") for curve in _curve(run.label, x, y)]
            y = measures.smoothed(y)
        drawn += _curve(run.label, x, y)
    panels = _panel("Training loss", drawn, "loss", runs)
    for key in _evaluation_keys(runs):
        name = key.removeprefix("eval_").replace("_", " ")
        each = _per_run(runs, lambda run: run.metrics, lambda record, key=key: record.get(key))
        panels += _panel(f"Held-out {name}", each, name, runs)
    results = [
        _titled(runs, run, f"{run.final['metric']} {run.final['value']:.4g}")
        for run in runs
        if isinstance(run.final.get("value"), int | float)
    ]
    caption = (
        "How well the model fits: the loss on the rows it trains on"
        + (" (faint: as logged; full: moving average, decay 0.9)" if any(c.kind == "raw" for c in drawn) else "")
        + ", and loss and metric on rows it never trains on. "
        + (f"Final result: {'; '.join(results)}." if results else "")
    )
    return Figure("loss", "Training", "Loss and metric", caption, panels)


def _evaluation_keys(runs: Runs) -> list[str]:
    """eval_loss, then the metrics the runs are judged by; of runs that are not finished all that were logged."""
    logged = dict.fromkeys(key for run in runs for record in run.metrics for key in record if key.startswith("eval_"))
    judged = dict.fromkeys(f"eval_{run.final['metric']}" for run in runs if run.final.get("metric"))
    named = judged or [key for key in logged if key.removeprefix("eval_") not in _BOOKKEEPING]
    return ["eval_loss", *(key for key in named if key != "eval_loss")]


# What the ranks are worth, and what they take.


def effective_rank(runs: Runs) -> Figure:
    """Effective rank and utilisation against the step (Fig. 1a)."""
    each = _per_run(runs, _snapshots, measures.effective_rank)
    share = _per_run(runs, _snapshots, measures.utilisation)
    ends = [f"{curve.y[-1]:.0%} used" + (f" ({curve.name})" if len(runs) > 1 else "") for curve in share]
    caption = (
        "How many directions the layers really use, and which share of their ranks that is. The effective rank of an "
        "update is exp(−Σ p ln p), p being its singular values over their sum (Roy and Vetterli, 2007): 1 for a single "
        "direction, r for r equally strong ones, 0 for no update yet. Utilisation is the sum of the effective ranks "
        "over the sum of the ranks. " + (f"At the end: {', '.join(ends)}." if ends else "")
    )
    panels = _panel("Effective rank", each, "sum over the layers", runs, from_zero=True)
    panels += _panel("Utilisation", share, "effective rank / rank", runs, from_zero=True)
    return Figure("effective-rank", "Capacity", "How much of the ranks is used", caption, panels)


def rank_against_importance(runs: Runs) -> Figure:
    """Mean rank against mean importance, one point per layer, one panel per run (Fig. 4b)."""
    panels, findings = [], []
    for run in _adjusted(runs):
        if run.recipe.get("method") in FOLLOW_IMPORTANCE:
            panels.append(Panel(_titled(runs, run, "Layers by module type"), importance_points(run)))
            rho = measures.correlation_with_importance(run, measures.mean_ranks(run))
            if rho is not None:
                findings.append(_titled(runs, run, f"ρ = {_signed(rho, '.2f')} over {len(run.layers)} layers."))
    caption = (
        "Each point is a layer: its importance (Eq. 7 of the paper) and its rank, over the adjustments. If ranks went "
        f"to the important layers, Spearman’s rank correlation ρ is near +1. {' '.join(findings)}"
    )
    return Figure("spearman", "Capacity", "Mean rank against mean importance", caption, panels)


def importance_points(run: RunRecords) -> Spec:
    """The layers by mean importance and mean rank."""
    ranks = measures.mean_ranks(run)
    scores = measures.mean_by_layer([record["layer_scores"] for record in run.adjustments])
    drawn = []
    for kind, layers in _by_type(run.layers).items():
        x, y = ([values[layer.name] for layer in layers] for values in (scores, ranks))
        drawn.append(Curve(kind, x, y, labels=[layer.short_name for layer in layers]))
    log = all(score > 0 for score in scores.values())
    return curves(drawn, Axes("mean importance of the layer", "mean rank", log_x=log, from_zero=True, points=True))


def parameters_and_rank(runs: Runs) -> Figure:
    """Adapter parameters and total rank against the step, with the budget as a line."""
    budgets = {
        (b.get("kind"), b["parameters"]) for run in runs if (b := run.header.get("budget") or {}).get("parameters")
    }
    line_at = None
    if len({parameters for _, parameters in budgets}) == 1:
        # A budget of ranks holds no parameters fixed: then the line is where the run began.
        name = "budget" if {kind for kind, _ in budgets} == {"parameters"} else "start"
        line_at = (name, next(iter(budgets))[1])

    def states(run: RunRecords) -> list[Record]:
        return sorted(run.snapshots + run.adjustments, key=lambda record: record["step"])

    held = _per_run(runs, states, lambda record: record.get("parameters"))
    total = _per_run(runs, states, lambda record: sum(record["ranks"].values()))
    panels = _panel("Adapter parameters", held, "parameters", runs, from_zero=True, step=True, line_at=line_at)
    panels += _panel("Total rank", total, "sum of the ranks", runs, from_zero=True, step=True)
    caption = (
        "How large the adapter is at each step. The ranks are real at all times: memory, optimizer and disk hold this "
        "many parameters and no more."
    )
    return Figure("parameters", "Cost", "Parameters and total rank", caption, panels)


# From records to curves.


def _adjusted(runs: Runs) -> list[RunRecords]:
    return [run for run in runs if run.adjustments]


def _snapshots(run: RunRecords) -> list[Record]:
    return run.snapshots


def _titled(runs: Runs, run: RunRecords, text: str) -> str:
    """The text, after the run's label where there are several."""
    return text if len(runs) == 1 else f"{run.label}: {text}"


def _panel(title: str, drawn: Sequence[Curve], y: str, runs: Runs, **options: Any) -> list[Panel]:
    """`[the panel]` of these curves over the steps, one colour a run; [] for no curves."""
    return [Panel(title, curves(drawn, Axes(STEP, y, **options), [run.label for run in runs]))] if drawn else []


def _per_run(
    runs: Runs, records: Callable[[RunRecords], Iterable[Record]], measure: Callable[[Record], Any]
) -> list[Curve]:
    """One curve for every run that recorded the measure."""
    return [curve for run in runs for curve in _curve(run.label, *_points(records(run), measure))]


def _points(records: Iterable[Record], measure: Callable[[Record], Any]) -> tuple[list[int], list[float]]:
    """Steps and finite measures of the records that have one, in order, the last of a step."""
    points = {}
    for record in records:
        value = measure(record)
        if isinstance(value, int | float) and math.isfinite(value):
            points[record["step"]] = value
    return list(points), list(points.values())


def _curve(name: str, x: Sequence[float], y: Sequence[float]) -> list[Curve]:
    """`[the curve]`, thinned to what a page can show; [] for no points."""
    kept = measures.thinned(len(x))
    return [Curve(name, [x[i] for i in kept], [y[i] for i in kept])] if kept else []


def _signed(value: float, form: str) -> str:
    return format(value, f"+{form}").replace("-", "−")
