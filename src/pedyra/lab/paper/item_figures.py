"""The paper's figures in the paper's layout, from the run folders of their rows, as charts of `pedyra.app.report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pedyra.app.report.chart import Axes, Curve, Spec, curves, rank_map
from pedyra.app.report.figures import STEP, history_panels, map_cells
from pedyra.app.report.images import FORMATS, save_image, side_by_side
from pedyra.app.report.records import RunRecords, read_run
from pedyra.lab.paper import run_measures
from pedyra.lab.paper.item import Item
from pedyra.lab.paper.item_results import Result

Runs = Mapping[str, RunRecords]
"""Row -> its run with the first seed, which curves show."""
Panels = Mapping[str, Spec]
"""Title -> chart, side by side."""
Drawing = Callable[[Runs, Sequence[Result]], Panels]


def save_figure(item: Item, found: Sequence[Result], runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write `<id>.svg` and `.png`; the files. Nothing where no run is there to draw."""
    if not runs:
        return []
    panels = FIGURES[item.id]({row: read_run(path) for row, path in runs.items()}, found)
    files = [folder / f"{item.id}.{suffix}" for suffix in FORMATS]
    for file in files:
        save_image(side_by_side(panels.items()), file)
    return files


def _lines(title: str, y: str, of: Callable[[RunRecords], run_measures.Series], **options: Any) -> Drawing:
    """A panel with a curve for each row."""
    return lambda runs, found: {title: _curves({row: of(run) for row, run in runs.items()}, y, **options)}


def _curves(several: Mapping[str, run_measures.Series], y: str, **options: Any) -> Spec:
    drawn = [Curve(name, [x for x, _ in points], [y for _, y in points]) for name, points in several.items() if points]
    return curves(drawn, Axes(STEP, y, **options))


def utilised(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 1a: effective rank, and its share of the ranks, over the steps."""
    total = _lines("Effective rank", "sum over layers", run_measures.effective_ranks, from_zero=True)
    share = _lines("Utilisation", "effective rank / rank", run_measures.utilisations, from_zero=True)
    return {**total(runs, found), **share(runs, found)}


def dynamics(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 3: rank and place by importance, in colour the layers whose rank changed most."""
    return {panel.title: panel.spec for panel in history_panels(next(iter(runs.values())))}


def bars(runs: Runs, found: Sequence[Result]) -> Panels:
    """Figs. 4a and 6: a group of bars a column, a bar a row, with 95 % intervals."""
    rows = []
    for result in found:
        if result.measured is not None:
            low, high = result.interval or (None, None)
            rows.append(
                {"row": result.row, "column": result.column, "value": result.measured, "low": low, "high": high}
            )
    names = list(dict.fromkeys(row["row"] for row in rows))
    place = {"x": {"field": "column", "type": "nominal", "sort": None, "title": None, "axis": {"labelAngle": 0}}}
    place |= {"xOffset": {"field": "row", "sort": names}}
    color = {"field": "row", "type": "nominal", "title": None, "sort": names}
    value = {"type": "quantitative", "title": "score"}
    ends = {"y": {"field": "low", **value}, "y2": {"field": "high"}}
    marks = [
        {"mark": "bar", "encoding": {**place, "y": {"field": "value", **value}, "color": color}},
        {"mark": "rule", "encoding": {**place, **ends}},
    ]
    return {"Mean and 95 % interval": {"data": {"values": rows}, "layer": marks}}


def rank_against_importance(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 4b: mean rank of each layer against its mean importance."""
    run = next(iter(runs.values()))
    value = run_measures.rank_importance_correlation(run)
    scores = run_measures.mean_by_layer([record["layer_scores"] for record in run.adjustments])
    ranks = run_measures.mean_ranks(run)
    rows = [{"x": scores[each.name], "y": ranks[each.name], "type": each.type} for each in run.layers]
    scale = {"type": "log" if min(scores.values()) > 0 else "linear"}
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": "mean importance of the layer", "scale": scale},
        "y": {"field": "y", "type": "quantitative", "title": "mean rank"},
        "color": {"field": "type", "type": "nominal", "title": None},
    }
    spec = {"data": {"values": rows}, "mark": {"type": "point", "filled": True, "size": 70}, "encoding": encoding}
    return {"Rank and importance" if value is None else f"Spearman's correlation {value:.2f}": spec}


def rank_maps(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 7: final rank by module type and depth, a map a row."""
    maps = {row: rank_map(map_cells(run.places, [run.final_ranks]), at="0") for row, run in runs.items()}
    return {f"({letter}) {row}": spec for letter, (row, spec) in zip("ab", maps.items(), strict=False)}


def masks(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 8: which triples are masked after each adjustment, a panel a weighting; those that came back stand out."""
    return {f"({letter}) {row}": _mask_map(run) for letter, (row, run) in zip("ab", runs.items(), strict=False)}


def _mask_map(run: RunRecords) -> Spec:
    masked = run_measures.masks(run)
    cells = [{"step": step, "triple": f"{name} {i}", "state": "masked"} for step, each in masked for name, i in each]
    for (_, before), (step, now) in pairwise(masked):
        cells += [{"step": step, "triple": f"{name} {i}", "state": "came back"} for name, i in before - now]
    shades = {"domain": ["masked", "came back"], "range": ["#b4bac0", "#C8500A"]}
    encoding = {
        "x": {"field": "step", "type": "ordinal", "title": "adjustment after step", "axis": {"labelAngle": 0}},
        "y": {"field": "triple", "type": "nominal", "title": "triple", "axis": {"labels": False, "ticks": False}},
        "color": {"field": "state", "type": "nominal", "title": None, "scale": shades},
    }
    return {"data": {"values": cells}, "mark": "rect", "encoding": encoding}


def orthogonality(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 10: the term of (a) one layer's A, the first feed-forward's as in the paper, and (b) all factors."""
    run = next(iter(runs.values()))
    layer = next((layer for layer in run.layers if "intermediate" in layer.name), run.layers[0])
    own = run_measures.series(run.snapshots, lambda record: record["orthogonality"][layer.name][0])
    return {
        f"(a) A of {layer.short_name}": _curves({"A": own}, "R"),
        "(b) Mean over all factors": _curves({"all": run_measures.orthogonalities(run)}, "R"),
    }


def gradients(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 11: norms of the gradients of A, E and B, averaged over layers."""
    run = next(iter(runs.values()))
    points = {factor: run_measures.gradient_norms(run, factor) for factor in run_measures.FACTORS}
    return {"Gradients of the factors": _curves(points, "mean norm", log_y=True)}


FIGURES: dict[str, Drawing] = {
    "figure1a": utilised,
    "figure1b": _lines("Stability of the importance ranking", "Spearman to the one before", run_measures.stabilities),
    "figure3": dynamics,
    "figure4a": bars,
    "figure4b": rank_against_importance,
    "figure5": _lines("Cross-layer variance of G^(2/3) / r", "log variance", run_measures.log_variances),
    "figure6": bars,
    "figure7": rank_maps,
    "figure8": masks,
    "figure9": _lines("Training loss", "loss", run_measures.training_losses),
    "figure10": orthogonality,
    "figure11": gradients,
}
"""Id -> its panels."""
