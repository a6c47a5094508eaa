"""What the paper's figures and Table 10 show of a run, as one number: run folder in, number out.

`None` stands for "this run has no such number". Names are those of `metric` in tables/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pedyra.app.report.measures import importance_ranks, mean_by_layer, spearman, utilisation
from pedyra.app.report.run_folder import Run, read_run

Measure = Callable[[Run], float | None]
Series = list[tuple[int, float]]
"""(step, value)."""
FACTORS = ("A", "E", "B")


def measure(row: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a comparison's row: one of its evaluation's, a cost, or one of `MEASURES` on its run folder."""
    if metric in row["metrics"]:
        return row["metrics"][metric]
    if metric in row:
        return row[metric]
    if metric in MEASURES:
        return MEASURES[metric](read_run(Path(row["run"])))
    return None


def effective_ranks(run: Run) -> Series:
    """Sum of the layers' effective ranks (Fig. 1a)."""
    kept = (record for record in run.snapshots if record.get("effective_rank"))
    return [(record["step"], sum(record["effective_rank"].values())) for record in kept]


def utilisations(run: Run) -> Series:
    """That over the sum of the ranks (Fig. 1a)."""
    kept = (record for record in run.snapshots if record.get("effective_rank"))
    shares = ((record["step"], utilisation(record["effective_rank"], record["ranks"])) for record in kept)
    return [(step, share) for step, share in shares if share is not None]


def stabilities(run: Run) -> Series:
    """Spearman's correlation of the layers' scores with those of the adjustment before (Fig. 1b)."""
    found = []
    for before, now in zip(run.adjustments, run.adjustments[1:], strict=False):
        names = list(now["layer_scores"])
        value = spearman([before["layer_scores"][n] for n in names], [now["layer_scores"][n] for n in names])
        if value is not None:
            found.append((now["step"], value))
    return found


def log_variances(run: Run) -> Series:
    """Log variance over layers of G^(2/3) / r, where scores were followed (Fig. 5)."""
    values = ((record["step"], record.get("two_thirds_log_variance")) for record in run.snapshots)
    return [(step, value) for step, value in values if value is not None]


def orthogonalities(run: Run) -> Series:
    """The orthogonality term averaged over all A and B (Fig. 10)."""
    return [(r["step"], fmean(x for pair in r["orthogonality"].values() for x in pair)) for r in run.snapshots]


def training_losses(run: Run) -> Series:
    """The loss as logged (Fig. 9)."""
    return [(row["step"], row["loss"]) for row in run.metrics if row.get("loss") is not None]


def gradient_norms(run: Run, factor: str) -> Series:
    """Mean over layers of the norms of the gradients of A, E or B, where they were followed (Fig. 11)."""
    place = FACTORS.index(factor)
    followed = (record for record in run.snapshots if record.get("grad_norms"))
    return [(record["step"], fmean(norms[place] for norms in record["grad_norms"].values())) for record in followed]


def masks(run: Run) -> list[tuple[int, set[tuple[str, int]]]]:
    """(step, the triples that are masked from there on), of a run whose method masks (Fig. 8)."""
    return [(r["step"], {(name, i) for name, i in r["masked"]}) for r in run.adjustments if "masked" in r]


def mean_places(run: Run) -> dict[str, float]:
    """Layer -> its mean place by importance over the adjustments, 1 = most important."""
    return mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])


def mean_ranks(run: Run) -> dict[str, float]:
    """Layer -> its mean rank over the adjustments."""
    return mean_by_layer([record["ranks"] for record in run.adjustments])


def _seconds_per_epoch(run: Run) -> float | None:
    """Training time over the epochs trained (Table 10)."""
    epochs = max((row["epoch"] for row in run.metrics if "epoch" in row), default=0.0)
    return run.final["seconds"] / epochs if epochs else None


def _trainable_share(run: Run) -> float | None:
    """Trained parameters over all (Table 3); as there, two weights of 4 bits count as one."""
    total = run.final.get("total_parameters")
    return run.final["trainable_parameters"] / total if total else None


def _peak_memory_difference(run: Run) -> float | None:
    """Peak memory in bytes less what was held when training began (Table 10)."""
    before = run.environment.get("memory_before_bytes")
    return run.final["peak_memory_bytes"] - before if before is not None else None


def _with_importance(values: Callable[[Run], Mapping[str, float]]) -> Measure:
    """Spearman's correlation with mean importance: positive where important layers have more."""

    def measured(run: Run) -> float | None:
        places = mean_places(run)
        return spearman([-place for place in places.values()], [values(run)[name] for name in places])

    return measured


def _rank_gini(run: Run) -> float | None:
    """Gini coefficient of the final ranks: 0 if all layers have the same, near 1 if one has all (Fig. 7)."""
    ranks = sorted(run.final_ranks.values())
    total, count = sum(ranks), len(ranks)
    return None if not total else sum((2 * i - count - 1) * rank for i, rank in enumerate(ranks, 1)) / (count * total)


def _reactivated_share(run: Run) -> float | None:
    """Mean share of the masked triples that the next adjustment no longer masks (Fig. 8)."""
    found = [before for _, before in masks(run)]
    return _mean(len(old - new) / len(old) for old, new in zip(found, found[1:], strict=False) if old)


def _loss_roughness(run: Run) -> float | None:
    """Standard deviation of the change of the loss from one log to the next (Fig. 9)."""
    losses = [loss for _, loss in training_losses(run)]
    changes = [now - before for before, now in zip(losses, losses[1:], strict=False)]
    return pstdev(changes) if len(changes) > 1 else None


def _at(place: int, series: Callable[[Run], Series]) -> Measure:
    """The first (0) or last (-1) value; None of none."""
    return lambda run: series(run)[place][1] if series(run) else None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


def _mean_of(series: Callable[[Run], Series]) -> Measure:
    return lambda run: _mean(value for _, value in series(run))


MEASURES: dict[str, Measure] = {
    "seconds_per_epoch": _seconds_per_epoch,
    "trainable_share": _trainable_share,
    "peak_memory_difference": _peak_memory_difference,
    "effective_rank": _at(-1, effective_ranks),
    "utilisation": _at(-1, utilisations),
    "ranking_stability": _mean_of(stabilities),
    "rank_importance_correlation": _with_importance(mean_ranks),  # Fig. 4b
    "change_importance_correlation": _with_importance(  # Fig. 3
        lambda run: {name: run.final_ranks[name] - rank for name, rank in run.start_ranks.items()}
    ),
    "first_log_variance": _at(0, log_variances),
    "last_log_variance": _at(-1, log_variances),
    "largest_rank": lambda run: max(run.final_ranks.values(), default=None),  # Fig. 7
    "rank_gini": _rank_gini,
    "reactivated_share": _reactivated_share,
    "mean_training_loss": _mean_of(training_losses),  # lower where it falls faster
    "loss_roughness": _loss_roughness,
    "first_orthogonality": _at(0, orthogonalities),
    "last_orthogonality": _at(-1, orthogonalities),
    "gradient_norm_A": _mean_of(lambda run: gradient_norms(run, "A")),
    "gradient_norm_E": _mean_of(lambda run: gradient_norms(run, "E")),
    "gradient_norm_B": _mean_of(lambda run: gradient_norms(run, "B")),
}
