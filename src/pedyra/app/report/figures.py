"""A run's records become the figures of its report, in the order of the page, and the sentences under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pedyra.app.recipe_sections import METRICS
from pedyra.app.report.chart import Axes, Chart, Curve, curves, rank_map
from pedyra.app.report.records import Layer, Record, RunRecords

STEP = "training step"
MOST_POINTS = 600  # a curve has no more
SHOWN = 3  # layers in colour at each end of the ranking by change of rank


@dataclass(frozen=True)
class Panel:
    """A panel has one pair of axes."""

    title: str
    chart: Chart
    frames: Sequence[str] = ()  # what the slider of the parameter `adjustment` says at each of its places
    stills: Sequence[tuple[str, Chart]] = ()  # title and chart of each image that stands for the slider in a file


@dataclass(frozen=True)
class Figure:
    """A numbered figure has panels, and a caption that says in plain words what is seen."""

    id: str
    section: str
    title: str
    caption: str
    panels: Sequence[Panel]  # none where the run recorded nothing of what it shows


def make_figures(run: RunRecords) -> list[Figure]:
    """Make every figure that the run has data for."""
    builders = (increase_by_size, rank_of_every_layer, history, loss_and_metrics, effective_rank)
    return [figure for figure in (build(run) for build in builders) if figure.panels]


def increase_by_size(run: RunRecords) -> Figure:
    """Show what the tolerance is of (answers that change, points of the accuracy, the loss) by the adapter's rank."""
    measure = run.fit["measure"] if run.fit else "loss"
    title, axis, unit = {
        "answers": ("Answers that change with a smaller adapter", "answers that change, %", 100),
        "accuracy": ("The accuracy with a smaller adapter", "points of the accuracy lost", 100),
    }.get(measure, ("The loss with a smaller adapter", f"rise of the {measure}", 1))
    panels = [Panel(title, size_curve(run.curve, axis, unit))] if len(run.curve) > 1 else []
    caption = (
        "What changes, against the whole adapter on the same held-out rows, when every layer keeps this rank at most: "
        "its most useful directions, which make up for those that go (bar: the truth lies below it, or above it, in "
        "5 % of cases at most). A size is accepted where the upper end of its bar lies below the dashed line. The ring "
        "is around the size that was taken."
    )
    if run.fit:
        caption += f" What is accepted keeps this promise: {run.fit['promise']}. The verdict: {run.fit['words']}."
    return Figure("fit", "Size", "How small may the adapter be?", caption, panels)


def size_curve(rows: Sequence[Mapping[str, Any]], axis: str, unit: float) -> Chart:
    """Draw one fit by rank; the whole adapter, to which the others are compared, is at 0."""
    whole = max(rows, key=lambda row: row["parameters"])
    points = [row if row is not whole else {**row, "value": 0.0, "lower": None, "upper": None} for row in rows]
    points = sorted((row for row in points if row.get("value") is not None), key=lambda row: row["rank"])
    ranks = [row["rank"] for row in points]
    values, low, high = (
        [None if row[key] is None else unit * row[key] for row in points] for key in ("value", "lower", "upper")
    )
    limit = next((unit * row["tolerance"] for row in rows if row.get("tolerance") is not None), None)
    axes = Axes(
        f"rank ({whole['rank']}: the whole adapter)",
        axis,
        log_x=True,
        x_ticks=ranks,
        linear_to=limit or None,
        line_at=None if limit is None else ("tolerance", float(f"{limit:.3g}")),
        ring=next(((row["rank"], unit * row["value"]) for row in points if row.get("chosen")), None),
    )
    return curves([Curve("measured", ranks, values, low, high)], axes)


def rank_of_every_layer(run: RunRecords) -> Figure:
    """Show ranks as module type by depth, one frame per adjustment."""
    caption = (
        "Each cell is one adapted layer of the model and shows its rank, that is how many directions it may learn; "
        "the stronger the colour, the higher. The slider goes through the adjustments; ▲ gained ranks, ▼ lost some."
    )
    panels = [_map(run)] if run.layers else []
    return Figure("map", "Ranks", "Rank of every layer", caption, panels)


def _map(run: RunRecords) -> Panel:
    title, states = "Module type by depth in the model", _states(run)
    frames = [f"Start: {_total(run.start_ranks, run.header['budget'])}"]
    for number, record in enumerate(run.adjustments, start=1):
        counts = f"{len(record['pruned'])} pruned, {sum(record['added'].values())} added"
        where = f"Adjustment {number} of {len(run.adjustments)}, step {record['step']:,}"
        frames.append(f"{where}: {counts}; {_total(record['ranks'], record)}")
    cells = map_cells(run.places, states)
    last = len(frames) - 1
    stills = [(f"{title}, start", rank_map(cells, at="0")), (f"{title}, end", rank_map(cells, at=str(last)))]
    return Panel(title, rank_map(cells), frames, stills if last else stills[:1])


def map_cells(places: Mapping[str, tuple[str, int | None]], states: Sequence[Mapping[str, int]]) -> list[Record]:
    """Make the cells of `rank_map`: `type`, `depth` (as text), and a frame a state of `ranks` and `changes`. Layers at
    one place share a cell, and what is outside of blocks comes last."""
    cells: dict[tuple[str, str], list[str]] = {}
    for name, (kind, depth) in sorted(places.items(), key=lambda item: (item[1][1] is None, item[1][1] or 0)):
        cells.setdefault((kind, "–" if depth is None else str(depth)), []).append(name)
    rows = []
    for (kind, depth), names in cells.items():
        totals = [sum(state[name] for name in names) for state in states]
        changes = [0, *(after - before for before, after in pairwise(totals))]
        ranks = [total / len(names) for total in totals]
        rows.append({"type": kind, "depth": depth, "ranks": ranks, "changes": changes})
    return rows


def _total(ranks: Mapping[str, int], record: Record) -> str:
    parameters = record["parameters"]
    return f"total rank {sum(ranks.values()):,}" + (f", {parameters:,} parameters" if parameters else "")


def history(run: RunRecords) -> Figure:
    """Show rank and place by importance of every layer."""
    caption = (
        "One line a layer: its rank, and its place among all layers by importance, the mean of the scores by which the "
        "method ranks its directions. In colour the layers whose rank changed most; the pointer names the others. "
        + _changes(run)
    )
    panels = history_panels(run) if run.adjustments else []
    return Figure("history", "Ranks", "Rank and importance of each layer over time", caption, panels)


def history_panels(run: RunRecords) -> list[Panel]:
    """Make the panels of `history`: the places by importance have one where there are two of them to compare."""
    at, states = [record["step"] for record in run.adjustments], _states(run)
    steps, end = [0, *at], run.header["schedule"]["total_steps"] or 0
    if end > steps[-1]:  # ranks stay as they are to the end of the schedule
        steps, states = [*steps, end], [*states, states[-1]]
    places = [importance_ranks(record["layer_scores"]) for record in run.adjustments]
    ranks = Panel("Rank", _by_layer(run, steps, states, Axes(STEP, "rank", step=True, from_zero=True)))
    if len(at) < 2:
        return [ranks]
    axes = Axes(STEP, "place (1 = most important)", reverse=True)
    return [ranks, Panel("Place by importance", _by_layer(run, at, places, axes))]


def importance_ranks(scores: Mapping[str, float]) -> dict[str, int]:
    """Give each layer its place by importance, 1 = most important (Fig. 3b); ties go by the order of the layers."""
    order = sorted(scores, key=lambda name: -scores[name])
    return {name: place for place, name in enumerate(order, start=1)}


def _by_layer(run: RunRecords, steps: Sequence[int], values: Sequence[Mapping[str, Any]], axes: Axes) -> Chart:
    """Draw a line a layer, in colour those whose rank changed most."""
    notables = notable(run)
    layers = [*notables, *(layer for layer in run.layers if layer not in notables)]
    return curves(
        [
            Curve(layer.short_name, steps, [value[layer.name] for value in values], quiet=layer not in notables)
            for layer in layers
        ],
        axes,
    )


def notable(run: RunRecords) -> list[Layer]:
    """Find the layers that gained most, then those that lost most: at most `SHOWN` each, only layers that changed."""
    change = {layer.name: run.final_ranks[layer.name] - layer.rank for layer in run.layers}
    by_change = sorted(run.layers, key=lambda layer: -change[layer.name])
    most = [layer for layer in by_change[:SHOWN] if change[layer.name] > 0]
    return most + [layer for layer in by_change[-SHOWN:] if change[layer.name] < 0]


def _changes(run: RunRecords) -> str:
    """Say which layers changed their rank most."""
    by_verb: dict[str, list[str]] = {}
    for layer in notable(run):
        end = run.final_ranks[layer.name]
        verb = "Gained" if end > layer.rank else "Lost"
        by_verb.setdefault(verb, []).append(f"{layer.short_name} ({layer.rank} → {end})")
    parts = [f"{verb} most: {', '.join(names)}." for verb, names in by_verb.items()]
    return " ".join(parts) or "No layer changed its rank."


def _states(run: RunRecords) -> list[Mapping[str, int]]:
    """Return the ranks at the start and after each adjustment."""
    return [run.start_ranks, *(record["ranks"] for record in run.adjustments)]


def loss_and_metrics(run: RunRecords) -> Figure:
    """Show training loss, and evaluation loss and the metric the run is judged by, against the step."""
    panels = _panel("Training loss", run.metrics, lambda record: record.get("loss"), "loss")
    data = run.recipe["data"]
    for name in ("loss", data.get("metric") or METRICS[data["kind"]][0]):
        title = name.replace("_", " ")
        panels += _panel(f"Held-out {title}", run.metrics, lambda record, name=name: record.get(f"eval_{name}"), title)
    caption = "How well the model fits: the loss on the rows it trains on, and loss and metric on rows it never sees. "
    if run.final["value"] is not None:
        caption += f"Final result: {run.final['metric']} {run.final['value']:.4g}."
    return Figure("loss", "Training", "Loss and metric", caption, panels)


def effective_rank(run: RunRecords) -> Figure:
    """Show effective rank and utilisation against the step."""
    panels = _panel("Effective rank", run.snapshots, total_effective_rank, "sum over the layers", from_zero=True)
    panels += _panel("Utilisation", run.snapshots, utilisation, "effective rank / rank", from_zero=True)
    caption = (
        "How many directions the layers really use, and which share of their ranks that is. The effective rank of an "
        "update is exp(−Σ p ln p), p being its singular values over their sum (Roy and Vetterli, 2007): 1 for a single "
        "direction, r for r equally strong ones, 0 for no update yet. Utilisation is the sum of the effective ranks "
        "over the sum of the ranks."
    )
    return Figure("effective-rank", "Capacity", "How much of the ranks is used", caption, panels)


def total_effective_rank(record: Record) -> float | None:
    """Sum the layers' effective ranks in a snapshot (Fig. 1a); None where it has none."""
    effective = [value for value in (record.get("effective_rank") or {}).values() if math.isfinite(value)]
    return sum(effective) if effective else None


def utilisation(record: Record) -> float | None:
    """Divide that by the sum of the ranks (Fig. 1a); None if no rank is left."""
    used, total = total_effective_rank(record), sum(record["ranks"].values())
    return used / total if used is not None and total else None


def _panel(
    title: str, records: Iterable[Record], measure: Callable[[Record], Any], y: str, **options: Any
) -> list[Panel]:
    """Return `[the panel]` of the finite measures over the steps, the last of a step; [] where there are not two. Of a
    long run, which has more than a page can draw, it has `MOST_POINTS`, and the last, spread evenly."""
    values = {record["step"]: value for record in records if (value := measure(record)) is not None}
    points = {step: value for step, value in values.items() if math.isfinite(value)}
    sample = list(points.items())
    if len(sample) > MOST_POINTS:
        sample = [sample[round(n * (len(sample) - 1) / MOST_POINTS)] for n in range(MOST_POINTS + 1)]
    curve = Curve(y, [step for step, _ in sample], [value for _, value in sample])
    return [Panel(title, curves([curve], Axes(STEP, y, **options)))] if len(points) > 1 else []
