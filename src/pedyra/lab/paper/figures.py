"""The paper's figures in the paper's layout, from the run folders of their rows, as charts of `pedyra.app.report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pedyra.app.report.chart import Axes, Curve, Spec, curves, rank_map
from pedyra.app.report.figure import STEP, mean
from pedyra.app.report.images import FORMATS, save_image
from pedyra.app.report.measures import importance_ranks, spearman
from pedyra.app.report.run_folder import Run, read_run
from pedyra.lab.paper import measures
from pedyra.lab.paper.item import Item
from pedyra.lab.paper.results import Result

Runs = Mapping[str, Run]
"""Row -> its run with the first seed, which curves show."""
Panels = Mapping[str, Spec]
"""Title -> chart, side by side."""
Points = Iterable[tuple[float, float]]
Figure = Callable[[Runs, Sequence[Result]], Panels]

WIDTH, HEIGHT = 380, 240  # of a panel, points
SHOWN = 3
"""Figure 3: layers in colour at each end of the ranking by change of rank."""


def save_figure(item: Item, found: Sequence[Result], runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write `<id>.svg` and `.png`; the files. Nothing where no run is there to draw."""
    if not runs:
        return []
    panels = FIGURES[item.id]({row: read_run(path) for row, path in runs.items()}, found)
    sized = [{"width": WIDTH, "height": HEIGHT, **spec, "title": title} for title, spec in panels.items()]
    whole = {"concat": sized, "columns": 2, "resolve": {"scale": {"color": "independent", "shape": "independent"}}}
    files = [folder / f"{item.id}.{suffix}" for suffix in FORMATS]
    for file in files:
        save_image(whole, file)
    return files


def _curves(several: Mapping[str, Points], y: str, x: str = STEP, **options: Any) -> Spec:
    """Curves by name; those without points are named all the same."""
    split = {name: list(points) for name, points in several.items()}
    drawn = [Curve(name, [at for at, _ in points], [value for _, value in points]) for name, points in split.items()]
    return curves([curve for curve in drawn if curve.x], Axes(x, y, **options), list(split))


def _series(title: str, y: str, of: Callable[[Run], measures.Series], **options: Any) -> Figure:
    """A panel with a curve for each row."""
    return lambda runs, found: {title: _curves({row: of(run) for row, run in runs.items()}, y, **options)}


def utilised(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 1a: effective rank, and its share of the ranks, over the steps."""
    total = _series("Effective rank", "sum over layers", measures.effective_ranks, from_zero=True)
    share = _series("Utilisation", "effective rank / rank", measures.utilisations, from_zero=True)
    return {**total(runs, found), **share(runs, found)}


def dynamics(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 3: (a) rank and (b) place by importance, in colour the layers whose rank changed most."""
    run = next(iter(runs.values()))
    order = sorted(run.layers, key=lambda layer: run.final_ranks[layer.name] - layer.rank)
    shown = {layer.short_name: layer.name for layer in [*order[-SHOWN:][::-1], *order[:SHOWN]]}
    places = [(record["step"], importance_ranks(record["layer_scores"])) for record in run.adjustments]
    ranks = [(0, run.start_ranks), *((record["step"], record["ranks"]) for record in run.adjustments)]
    by_rank = {short: [(step, each[name]) for step, each in ranks] for short, name in shown.items()}
    by_place = {short: [(step, place[name]) for step, place in places] for short, name in shown.items()}
    return {
        "(a) Rank dynamics": _curves(by_rank, "rank", step=True, from_zero=True),
        "(b) Importance ranking": _curves(by_place, "place (1 = most important)", reverse=True),
    }


def bars(runs: Runs, found: Sequence[Result]) -> Panels:
    """Figs. 4a and 6: a group of bars a column, a bar a row, with 95 % intervals."""
    rows = [
        {"row": r.row, "column": r.column, "value": r.measured, "low": (r.interval or (None, None))[0]}
        | {"high": (r.interval or (None, None))[1]}
        for r in found
        if r.measured is not None
    ]
    names = list(dict.fromkeys(each["row"] for each in rows))
    place = {"x": {"field": "column", "type": "nominal", "sort": None, "title": None, "axis": {"labelAngle": 0}}}
    place |= {"xOffset": {"field": "row", "sort": names}}
    color = {"field": "row", "type": "nominal", "title": None, "sort": names}
    value = {"type": "quantitative", "title": "score"}
    ends = {"y": {"field": "low", **value}, "y2": {"field": "high"}}
    marks = [
        {"mark": "bar", "encoding": {**place, "y": {"field": "value", **value}, "color": color}},
        {"mark": {"type": "rule", "style": "error"}, "encoding": {**place, **ends}},
    ]
    return {"Mean and 95 % interval": {"data": {"values": rows}, "layer": marks}}


def rank_against_importance(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 4b: mean rank of each layer against its mean place by importance."""
    run = next(iter(runs.values()))
    places, ranks = measures.mean_places(run), measures.mean_ranks(run)
    value = spearman([-place for place in places.values()], [ranks[name] for name in places])
    title = "Rank and importance" if value is None else f"Spearman's correlation {value:.2f}"
    points = {"layers": [(places[name], ranks[name]) for name in places]}
    return {title: _curves(points, "mean rank", "mean place by importance (1 = most important)", points=True)}


def rank_maps(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 7: final rank by module type and depth, a map a row."""
    return {f"({letter}) {row}": _map(run) for letter, (row, run) in zip("ab", runs.items(), strict=False)}


def _map(run: Run) -> Spec:
    places: dict[tuple[str, str], list[int]] = {}
    for layer in sorted(run.layers, key=lambda layer: (layer.depth is None, layer.depth or 0)):
        place = (layer.type, "–" if layer.depth is None else str(layer.depth))
        places.setdefault(place, []).append(run.final_ranks[layer.name])
    cells = [
        {"type": kind, "depth": depth, "ranks": [mean(ranks)], "changes": [0]}
        for (kind, depth), ranks in places.items()
    ]
    return {**rank_map(cells, at="0"), "width": {"step": 30}, "height": {"step": 24}}


def masks(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 8: which triples are masked after each adjustment, a panel a weighting; those that came back stand out."""
    return {f"({letter}) {row}": _mask_map(run) for letter, (row, run) in zip("ab", runs.items(), strict=False)}


def _mask_map(run: Run) -> Spec:
    masked = measures.masks(run)
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
    own = [(record["step"], record["orthogonality"][layer.name][0]) for record in run.snapshots]
    return {
        f"(a) A of {layer.short_name}": _curves({"A": own}, "R"),
        "(b) Mean over all factors": _curves({"all": measures.orthogonalities(run)}, "R"),
    }


def gradients(runs: Runs, found: Sequence[Result]) -> Panels:
    """Fig. 11: norms of the gradients of A, E and B, averaged over layers."""
    run = next(iter(runs.values()))
    points = {factor: measures.gradient_norms(run, factor) for factor in measures.FACTORS}
    return {"Gradients of the factors": _curves(points, "mean norm", log_y=True)}


FIGURES: dict[str, Figure] = {
    "figure1a": utilised,
    "figure1b": _series("Stability of the importance ranking", "Spearman to the one before", measures.stabilities),
    "figure3": dynamics,
    "figure4a": bars,
    "figure4b": rank_against_importance,
    "figure5": _series("Cross-layer variance of G^(2/3) / r", "log variance", measures.log_variances),
    "figure6": bars,
    "figure7": rank_maps,
    "figure8": masks,
    "figure9": _series("Training loss", "loss", measures.training_losses),
    "figure10": orthogonality,
    "figure11": gradients,
}
"""Id -> its panels."""
