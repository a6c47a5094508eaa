"""The paper's figures and Table 10 from runs: as one number, and as charts in the paper's layout.

A measure takes the records of a run folder, and is None where the run lacks them; its name is a `metric` in tables/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import altair as alt
from scipy import stats

from pedyra.app.report.chart import Axes, Chart, Curve, curves, rank_map
from pedyra.app.report.figures import (
    STEP,
    history_panels,
    importance_ranks,
    map_cells,
    total_effective_rank,
    utilisation,
)
from pedyra.app.report.images import FORMATS, save_image, side_by_side
from pedyra.app.report.records import Record, RunRecords, read_run
from pedyra.lab.paper.item import Item
from pedyra.lab.paper.item_results import CellRow

Measure = Callable[[RunRecords], float | None]
Series = list[tuple[int, float]]
"""(step, value)."""
FACTORS = ("A", "E", "B")


def measure(row: Mapping[str, Any], metric: str) -> float | None:
    """Return a metric of a comparison's row: of its evaluation, a cost, or one of `MEASURES`."""
    for source in (row["metrics"], row):
        if metric in source:
            return source[metric]
    return MEASURES[metric](read_run(Path(row["run"]))) if metric in MEASURES else None


def series(records: Iterable[Record], value: Callable[[Record], float | None]) -> Series:
    """Return the records that have the value."""
    return [(record["step"], number) for record in records if (number := value(record)) is not None]


def snapshots(value: Callable[[Record], float | None]) -> Callable[[RunRecords], Series]:
    return lambda run: series(run.snapshots, value)


effective_ranks = snapshots(total_effective_rank)
"""Fig. 1a: the sum of the layers' effective ranks."""
utilisations = snapshots(utilisation)
"""Fig. 1a: the effective ranks over the sum of the ranks."""
log_variances = snapshots(lambda record: record.get("two_thirds_log_variance"))
"""Fig. 5: the log variance over layers of G^(2/3) / r, where scores were followed."""
orthogonalities = snapshots(lambda record: fmean(x for pair in record["orthogonality"].values() for x in pair))
"""Fig. 10: the orthogonality term averaged over all A and B."""


def stabilities(run: RunRecords) -> Series:
    """Correlate the layers' scores by Spearman with those of the adjustment before (Fig. 1b)."""
    points = []
    for before, now in pairwise(run.adjustments):
        old, new = before["layer_scores"], now["layer_scores"]
        if (correlation := spearman([old[name] for name in new], list(new.values()))) is not None:
            points.append((now["step"], correlation))
    return points


def training_losses(run: RunRecords) -> Series:
    """Return the loss as logged (Fig. 9)."""
    return series(run.metrics, lambda record: record.get("loss"))


def gradient_norms(run: RunRecords, factor: str) -> Series:
    """Return the mean over layers of the norms of the gradients of A, E or B, where they were followed (Fig. 11)."""
    place = FACTORS.index(factor)
    records = (record for record in run.snapshots if record.get("grad_norms"))
    return series(records, lambda record: fmean(norms[place] for norms in record["grad_norms"].values()))


def masks(run: RunRecords) -> list[tuple[int, set[tuple[str, int]]]]:
    """Return (step, masked triples after it) of a run whose method masks (Fig. 8)."""
    return [(r["step"], {(name, i) for name, i in r["masked"]}) for r in run.adjustments if "masked" in r]


def reactivations(run: RunRecords) -> Series:
    """Return the share of the masked triples that an adjustment no longer masks (Fig. 8)."""
    return [(step, len(old - new) / len(old)) for (_, old), (step, new) in pairwise(masks(run)) if old]


def _seconds_per_epoch(run: RunRecords) -> float | None:
    """Divide the training time by the epochs trained (Table 10)."""
    epochs = max((row["epoch"] for row in run.metrics if "epoch" in row), default=0.0)
    return run.final["seconds"] / epochs if epochs else None


def _trainable_share(run: RunRecords) -> float | None:
    """Divide the trained parameters by all (Table 3); as there, two weights of 4 bits count as one."""
    total = run.final.get("total_parameters")
    return run.final["trainable_parameters"] / total if total else None


def _peak_memory_difference(run: RunRecords) -> float | None:
    """Return the peak memory in bytes less the memory before training (Table 10)."""
    before = run.environment.get("memory_before_bytes")
    return run.final["peak_memory_bytes"] - before if before is not None else None


def mean_by_layer(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each layer's value over the records."""
    return {name: fmean(record[name] for record in records) for name in records[0]} if records else {}


def mean_ranks(run: RunRecords) -> dict[str, float]:
    """Average each layer's rank over the adjustments."""
    return mean_by_layer([record["ranks"] for record in run.adjustments])


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlate by Spearman, ties by mean rank (Fig. 4b); None if a side is constant or has fewer than three points."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    result: Any = stats.spearmanr(x, y)  # its declared type hides the fields
    return float(result.statistic)


def _correlation_with_importance(run: RunRecords, values: Mapping[str, float]) -> float | None:
    """Correlate the layers' values with their mean importance by Spearman: positive where important ones have more.

    Importance is a place, for scores of different adjustments are of different size.
    """
    places = mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])
    return spearman([-place for place in places.values()], [values[name] for name in places])


def rank_importance_correlation(run: RunRecords) -> float | None:
    """Correlate the layers' mean rank with their importance (Fig. 4b)."""
    return _correlation_with_importance(run, mean_ranks(run))


def _change_importance_correlation(run: RunRecords) -> float | None:
    """Correlate the change of the layers' rank with their importance (Fig. 3)."""
    changes = {name: run.final_ranks[name] - rank for name, rank in run.start_ranks.items()}
    return _correlation_with_importance(run, changes)


def _rank_gini(run: RunRecords) -> float | None:
    """Compute the Gini coefficient of the ranks: 0 if all layers have the same, near 1 if one has all (Fig. 7)."""
    ranks = sorted(run.final_ranks.values())
    total, count = sum(ranks), len(ranks)
    return None if not total else sum((2 * i - count - 1) * rank for i, rank in enumerate(ranks, 1)) / (count * total)


def _loss_roughness(run: RunRecords) -> float | None:
    """Compute the standard deviation of the change of the loss from one log to the next (Fig. 9)."""
    changes = [now - before for (_, before), (_, now) in pairwise(training_losses(run))]
    return pstdev(changes) if len(changes) > 1 else None


def _at(place: int, of: Callable[[RunRecords], Series]) -> Measure:
    """Measure the first (0) or last (-1) value; None of none."""
    return lambda run: of(run)[place][1] if of(run) else None


def _mean_of(of: Callable[[RunRecords], Series]) -> Measure:
    return lambda run: fmean(value for _, value in of(run)) if of(run) else None


MEASURES: dict[str, Measure] = {
    "seconds_per_epoch": _seconds_per_epoch,
    "trainable_share": _trainable_share,
    "peak_memory_difference": _peak_memory_difference,
    "effective_rank": _at(-1, effective_ranks),
    "utilisation": _at(-1, utilisations),
    "ranking_stability": _mean_of(stabilities),
    "rank_importance_correlation": rank_importance_correlation,
    "change_importance_correlation": _change_importance_correlation,
    "first_log_variance": _at(0, log_variances),
    "last_log_variance": _at(-1, log_variances),
    "largest_rank": lambda run: max(run.final_ranks.values(), default=None),  # Fig. 7
    "rank_gini": _rank_gini,
    "reactivated_share": _mean_of(reactivations),
    "mean_training_loss": _mean_of(training_losses),  # lower where it falls faster
    "loss_roughness": _loss_roughness,
    "first_orthogonality": _at(0, orthogonalities),
    "last_orthogonality": _at(-1, orthogonalities),
    **{f"gradient_norm_{factor}": _mean_of(partial(gradient_norms, factor=factor)) for factor in FACTORS},
}


Runs = Mapping[str, RunRecords]
"""CellRow -> its run with the first seed, which curves show."""
Panels = Mapping[str, Chart]
"""Title -> chart, side by side."""
Drawing = Callable[[Runs, Sequence[CellRow]], Panels]


def save_figure(item: Item, rows: Sequence[CellRow], runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write `<id>.svg` and `.png`, and return the files; none where no run is there to draw."""
    if not runs:
        return []
    panels = FIGURES[item.id]({row: read_run(path) for row, path in runs.items()}, rows)
    files = [folder / f"{item.id}.{suffix}" for suffix in FORMATS]
    for file in files:
        save_image(side_by_side(panels.items()), file)
    return files


def _lines(title: str, y: str, of: Callable[[RunRecords], Series], **options: Any) -> Drawing:
    """Draw a panel with a curve for each row."""
    return lambda runs, cells: {title: _curves({row: of(run) for row, run in runs.items()}, y, **options)}


def _curves(several: Mapping[str, Series], y: str, **options: Any) -> Chart:
    lines = [Curve(name, [x for x, _ in points], [y for _, y in points]) for name, points in several.items() if points]
    return curves(lines, Axes(STEP, y, **options))


def utilised(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 1a: effective rank, and its share of the ranks, over the steps."""
    total = _lines("Effective rank", "sum over layers", effective_ranks, from_zero=True)
    share = _lines("Utilisation", "effective rank / rank", utilisations, from_zero=True)
    return {**total(runs, cells), **share(runs, cells)}


def dynamics(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 3: rank and place by importance, in colour the layers whose rank changed most."""
    return {panel.title: panel.chart for panel in history_panels(next(iter(runs.values())))}


def bars(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Figs. 4a and 6: a group of bars a column, a bar a row, with 95 % intervals."""
    rows = [row for row in cells if row["measured"] is not None]
    names = list(dict.fromkeys(row["row"] for row in rows))
    groups = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("column:N", sort=None, title=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("row:N", sort=names),
    )
    marks = groups.mark_bar().encode(alt.Y("measured:Q", title="score"), alt.Color("row:N", title=None, sort=names))
    ends = groups.mark_rule().encode(alt.Y("interval_low:Q", title="score"), alt.Y2("interval_high"))
    return {"Mean and 95 % interval": marks + ends}


def rank_against_importance(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 4b: mean rank of each layer against its mean importance."""
    run = next(iter(runs.values()))
    value = rank_importance_correlation(run)
    scores = mean_by_layer([record["layer_scores"] for record in run.adjustments])
    ranks = mean_ranks(run)
    rows = [{"x": scores[each.name], "y": ranks[each.name], "type": each.type} for each in run.layers]
    scale = alt.Scale(type="log" if min(scores.values()) > 0 else "linear")
    chart = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=70)
    chart = chart.encode(
        alt.X("x:Q", title="mean importance of the layer", scale=scale),
        alt.Y("y:Q", title="mean rank"),
        alt.Color("type:N", title=None),
    )
    return {"Rank and importance" if value is None else f"Spearman's correlation {value:.2f}": chart}


def rank_maps(runs: Runs, results: Sequence[CellRow]) -> Panels:
    """Draw Fig. 7: final rank by module type and depth, a map a row."""
    cells = {row: map_cells(run.places, [run.final_ranks]) for row, run in runs.items()}
    highest = max(rank for each in cells.values() for cell in each for rank in cell["ranks"])  # one colour, one rank
    maps = {row: rank_map(each, at="0", highest=highest) for row, each in cells.items()}
    return {f"({letter}) {row}": spec for letter, (row, spec) in zip("ab", maps.items(), strict=False)}


def mask_maps(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 8: the triples that are masked after each adjustment, a panel a weighting, and how many come back."""
    maps = {f"({letter}) {row}": _mask_map(run) for letter, (row, run) in zip("ab", runs.items(), strict=False)}
    share = _lines("(c) Share that came back", "of the masked triples", reactivations, from_zero=True)
    return {**maps, **share(runs, cells)}


def _mask_map(run: RunRecords) -> Chart:
    sets = masks(run)
    cells = [{"step": step, "triple": f"{name} {i}", "state": "masked"} for step, each in sets for name, i in each]
    for (_, before), (step, now) in pairwise(sets):
        cells += [{"step": step, "triple": f"{name} {i}", "state": "came back"} for name, i in before - now]
    shades = alt.Scale(domain=["masked", "came back"], range=["#b4bac0", "#C8500A"])
    chart = alt.Chart(alt.InlineData(values=cells)).mark_rect()
    return chart.encode(
        alt.X("step:O", title="adjustment after step", axis=alt.Axis(labelAngle=0)),
        alt.Y("triple:N", title="triple", axis=alt.Axis(labels=False, ticks=False)),
        alt.Color("state:N", title=None, scale=shades),
    )


def losses(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 9: the training losses, and between two rows their difference, which small models hide in the noise."""
    panels = dict(_lines("Training loss", "loss", training_losses)(runs, cells))
    if len(runs) == 2:
        (first, before), (second, after) = ((row, dict(training_losses(run))) for row, run in runs.items())
        steps = sorted(before.keys() & after.keys())
        less = [(step, after[step] - before[step]) for step in steps]
        panels["Difference"] = _curves({f"{second} less {first}": less}, f"{second} less {first}")
    return panels


def orthogonality(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 10: the term of (a) one layer's A, the first feed-forward's as in the paper, and (b) all factors."""
    run = next(iter(runs.values()))
    layer = next((layer for layer in run.layers if "intermediate" in layer.name), run.layers[0])
    own = series(run.snapshots, lambda record: record["orthogonality"][layer.name][0])
    return {
        f"(a) A of {layer.short_name}": _curves({"A": own}, "R"),
        "(b) Mean over all factors": _curves({"all": orthogonalities(run)}, "R"),
    }


def gradients(runs: Runs, cells: Sequence[CellRow]) -> Panels:
    """Draw Fig. 11: norms of the gradients of A, E and B, averaged over layers."""
    run = next(iter(runs.values()))
    points = {factor: gradient_norms(run, factor) for factor in FACTORS}
    return {"Gradients of the factors": _curves(points, "mean norm", log_y=True)}


FIGURES: dict[str, Drawing] = {
    "figure1a": utilised,
    "figure1b": _lines("Stability of the importance ranking", "Spearman to the one before", stabilities),
    "figure3": dynamics,
    "figure4a": bars,
    "figure4b": rank_against_importance,
    "figure5": _lines("Cross-layer variance of G^(2/3) / r", "log variance", log_variances),
    "figure6": bars,
    "figure7": rank_maps,
    "figure8": mask_maps,
    "figure9": losses,
    "figure10": orthogonality,
    "figure11": gradients,
}
"""Id -> its panels."""
