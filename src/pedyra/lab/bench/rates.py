"""Methods over a grid of learning rates: each at its best rate, against a baseline at its own, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.lab.compare.statistics import PairedDifference, compare_paired, mean, standard_error

Losses = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> loss, infinite where the run diverged."""


@dataclass(frozen=True)
class RateSummary:
    """One method; lower is better."""

    name: str
    means: dict[float, float]
    """Learning rate -> mean over its seeds."""
    best: float
    """The rate with the lowest mean, of those that have the most seeds."""
    seeds: int
    loss: float
    """Mean at `best`."""
    error: float | None
    """Its standard error; None for one seed."""
    edge: str
    """"lowest" or "highest" where the best rate ends the grid (or is all of it), and so need not be the best."""
    difference: PairedDifference | None
    """This method less the baseline, each at its best rate; None for the baseline and without a common seed."""


def rates_by_method(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
    """Rows with `method`, `lr`, `seed` and `loss` (None: diverged) -> the losses of each method.

    Of a method whose settings changed, as `config` tells, only the rows of its last ones count.
    """
    methods: dict[str, dict[float, dict[int, float]]] = {}
    last = {row["method"]: row.get("config") for row in rows}
    for row in rows:
        if row.get("config") != last[row["method"]]:
            continue
        loss = math.inf if row["loss"] is None else row["loss"]
        methods.setdefault(row["method"], {}).setdefault(row["lr"], {})[row["seed"]] = loss
    return methods


def summarise_rates(methods: Mapping[str, Losses], baseline: str = "lora") -> list[RateSummary]:
    """A summary per method, in the order given.

    The best rate is chosen from the very runs that are then compared, which flatters every method a little, those
    with more rates a little more: give all of them the same grid.
    """
    best = {name: best_rate(losses) for name, losses in methods.items()}
    summaries = []
    for name, losses in methods.items():
        rate = best[name]
        values = list(losses[rate].values())
        difference = None
        if name != baseline and baseline in methods:
            difference = compare_paired(losses[rate], methods[baseline][best[baseline]])
        summaries.append(
            RateSummary(
                name=name,
                means={lr: mean(list(losses[lr].values())) for lr in sorted(losses)},
                best=rate,
                seeds=len(values),
                loss=mean(values),
                error=standard_error(values),
                edge="lowest" if rate == min(losses) else "highest" if rate == max(losses) else "",
                difference=difference,
            )
        )
    return summaries


def best_rate(losses: Losses) -> float:
    """The rate with the lowest mean, of those that have the most seeds; the lowest of equal ones."""
    most = max(map(len, losses.values()))
    full = [lr for lr in sorted(losses) if len(losses[lr]) == most]
    return min(full, key=lambda lr: mean(list(losses[lr].values())))


def rate_table(summaries: Sequence[RateSummary]) -> list[list[str]]:
    """Titles, then a line a method; `!` marks a best rate at the edge of its grid."""
    rates = sorted({lr for summary in summaries for lr in summary.means})
    rows = [["method", *(f"{lr:g}" for lr in rates), "best lr", "seeds", "loss", "error", "less lora", "95 %"]]
    for summary in summaries:
        difference = summary.difference
        interval = difference.interval if difference else None
        rows.append(
            [
                summary.name,
                *(_loss(summary.means.get(lr)) for lr in rates),
                f"{summary.best:g}{'!' if summary.edge else ' '}",
                str(summary.seeds),
                _loss(summary.loss),
                "" if summary.error is None else f"{summary.error:.4f}",
                f"{difference.mean:+.4f}" if difference else "",
                f"{interval[0]:+.4f} {interval[1]:+.4f}" if interval else "",
            ]
        )
    return rows


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "diverged"
