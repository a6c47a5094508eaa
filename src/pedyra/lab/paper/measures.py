"""What the paper's figures and Table 10 show of a run, as one number: run folder in, number out.

`None` stands for "this run has no such number". Names are those of `metric` in tables/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from pedyra.app.report.measures import importance_ranks, mean_by_layer, spearman, utilisation
from pedyra.app.report.run_folder import Record, Run, read_run

Measure = Callable[[Run], float | None]


def measure(row: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a comparison's row: one of its evaluation's, a cost, or one of `MEASURES` on its run folder."""
    if metric in row["metrics"]:
        return row["metrics"][metric]
    if metric in row:
        return row[metric]
    if metric in MEASURES:
        return MEASURES[metric](read_run(Path(row["run"])))
    return None


def seconds_per_epoch(run: Run) -> float | None:
    """Training time over the epochs trained (Table 10)."""
    epochs = max((row["epoch"] for row in run.metrics if "epoch" in row), default=0.0)
    return run.final["seconds"] / epochs if epochs else None


def trainable_share(run: Run) -> float | None:
    """Trained parameters over all (Table 3); as there, two weights of 4 bits count as one."""
    total = run.final.get("total_parameters")
    return run.final["trainable_parameters"] / total if total else None


def peak_memory_difference(run: Run) -> float | None:
    """Peak memory in bytes less what was held when training began (Table 10)."""
    before = run.environment.get("memory_before_bytes")
    return run.final["peak_memory_bytes"] - before if before is not None else None


def effective_rank(run: Run) -> float | None:
    """Sum of the layers' effective ranks at the last log (Fig. 1a)."""
    last = _last(run, "effective_rank")
    return None if last is None else sum(last["effective_rank"].values())


def effective_share(run: Run) -> float | None:
    """That over the sum of the ranks (Fig. 1a)."""
    last = _last(run, "effective_rank")
    return None if last is None else utilisation(last["effective_rank"], last["ranks"])


def stabilities(run: Run) -> list[tuple[int, float]]:
    """(step, Spearman's correlation of the layers' scores with those of the adjustment before) (Fig. 1b)."""
    found = []
    for before, now in zip(run.adjustments, run.adjustments[1:], strict=False):
        names = list(now["layer_scores"])
        value = spearman([before["layer_scores"][n] for n in names], [now["layer_scores"][n] for n in names])
        if value is not None:
            found.append((now["step"], value))
    return found


def ranking_stability(run: Run) -> float | None:
    """Mean of `stabilities`."""
    return _mean(value for _, value in stabilities(run))


def mean_places(run: Run) -> dict[str, float]:
    """Layer -> its mean place by importance over the adjustments, 1 = most important."""
    return mean_by_layer([importance_ranks(record["layer_scores"]) for record in run.adjustments])


def mean_ranks(run: Run) -> dict[str, float]:
    """Layer -> its mean rank over the adjustments."""
    return mean_by_layer([record["ranks"] for record in run.adjustments])


def rank_importance_correlation(run: Run) -> float | None:
    """Spearman's correlation of mean rank with mean importance, positive where important layers are wide (Fig. 4b)."""
    return _with_importance(run, mean_ranks(run))


def change_importance_correlation(run: Run) -> float | None:
    """The same of the change of rank over the run (Fig. 3)."""
    return _with_importance(run, {name: run.final_ranks[name] - rank for name, rank in run.start_ranks.items()})


def _with_importance(run: Run, values: Mapping[str, float]) -> float | None:
    places = mean_places(run)
    return spearman([-place for place in places.values()], [values[name] for name in places])


def log_variances(run: Run) -> list[tuple[int, float]]:
    """(step, log variance over layers of G^(2/3) / r), where scores were followed (Fig. 5)."""
    values = ((record["step"], record.get("two_thirds_log_variance")) for record in run.snapshots)
    return [(step, value) for step, value in values if value is not None]


def first_log_variance(run: Run) -> float | None:
    return next((value for _, value in log_variances(run)), None)


def last_log_variance(run: Run) -> float | None:
    return next((value for _, value in reversed(log_variances(run))), None)


def largest_rank(run: Run) -> float | None:
    """Of any layer, at the end (Fig. 7)."""
    return max(run.final_ranks.values(), default=None)


def rank_gini(run: Run) -> float | None:
    """Gini coefficient of the final ranks: 0 if all layers have the same, near 1 if one has all (Fig. 7)."""
    ranks = sorted(run.final_ranks.values())
    total, count = sum(ranks), len(ranks)
    return None if not total else sum((2 * i - count - 1) * rank for i, rank in enumerate(ranks, 1)) / (count * total)


def masks(run: Run) -> list[tuple[int, set[tuple[str, int]]]]:
    """(step, the triples that are masked from there on), of a run whose method masks (Fig. 8)."""
    return [(r["step"], {(name, i) for name, i in r["masked"]}) for r in run.adjustments if "masked" in r]


def reactivated_share(run: Run) -> float | None:
    """Mean share of the masked triples that the next adjustment no longer masks (Fig. 8)."""
    found = [before for _, before in masks(run)]
    return _mean(len(old - new) / len(old) for old, new in zip(found, found[1:], strict=False) if old)


def training_losses(run: Run) -> list[tuple[int, float]]:
    """(step, loss as logged)."""
    return [(row["step"], row["loss"]) for row in run.metrics if row.get("loss") is not None]


def mean_training_loss(run: Run) -> float | None:
    """Of all logged ones: lower where it falls faster (Fig. 9)."""
    return _mean(loss for _, loss in training_losses(run))


def loss_roughness(run: Run) -> float | None:
    """Standard deviation of the change of the loss from one log to the next (Fig. 9)."""
    losses = [loss for _, loss in training_losses(run)]
    changes = [now - before for before, now in zip(losses, losses[1:], strict=False)]
    return pstdev(changes) if len(changes) > 1 else None


def orthogonalities(run: Run) -> list[tuple[int, float]]:
    """(step, the orthogonality term averaged over all A and B) (Fig. 10)."""
    return [(r["step"], fmean(x for pair in r["orthogonality"].values() for x in pair)) for r in run.snapshots]


def first_orthogonality(run: Run) -> float | None:
    return next((value for _, value in orthogonalities(run)), None)


def last_orthogonality(run: Run) -> float | None:
    return next((value for _, value in reversed(orthogonalities(run))), None)


FACTORS = ("A", "E", "B")


def gradient_norms(run: Run) -> Iterator[tuple[int, list[float]]]:
    """(step, mean over layers of the norms of the gradients of A, E, B), where they were followed (Fig. 11)."""
    for record in run.snapshots:
        if record.get("grad_norms"):
            norms = list(record["grad_norms"].values())
            yield record["step"], [fmean(layer[index] for layer in norms) for index in range(len(FACTORS))]


def _gradient_norm(index: int) -> Measure:
    return lambda run: _mean(norms[index] for _, norms in gradient_norms(run))


MEASURES: dict[str, Measure] = {
    **{f"gradient_norm_{name}": _gradient_norm(index) for index, name in enumerate(FACTORS)},
    "seconds_per_epoch": seconds_per_epoch,
    "trainable_share": trainable_share,
    "peak_memory_difference": peak_memory_difference,
    "effective_rank": effective_rank,
    "utilisation": effective_share,
    "ranking_stability": ranking_stability,
    "rank_importance_correlation": rank_importance_correlation,
    "change_importance_correlation": change_importance_correlation,
    "first_log_variance": first_log_variance,
    "last_log_variance": last_log_variance,
    "largest_rank": largest_rank,
    "rank_gini": rank_gini,
    "reactivated_share": reactivated_share,
    "mean_training_loss": mean_training_loss,
    "loss_roughness": loss_roughness,
    "first_orthogonality": first_orthogonality,
    "last_orthogonality": last_orthogonality,
}


def _last(run: Run, key: str) -> Record | None:
    return next((record for record in reversed(run.snapshots) if record.get(key)), None)


def _mean(values: Any) -> float | None:
    values = list(values)
    return fmean(values) if values else None
