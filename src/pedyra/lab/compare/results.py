"""The results of a comparison: a row for each run, the chosen learning rates, and remarks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pedyra.app.recipe_sections import LOWER_IS_BETTER
from pedyra.lab.compare.grid import Grid, Judge
from pedyra.lab.compare.jobs import Entry, Job, JobEnd
from pedyra.lab.compare.statistics import reach

RunRow = dict[str, Any]
"""A line of comparison.jsonl, for one finished run; `result_row` makes it."""


def sign(metric: str) -> int:
    """Return 1 if more is better, -1 if less is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def collect(jobs: Iterable[Job], judge: Judge) -> list[RunRow]:
    """Return the rows of the jobs that are finished."""
    return [result_row(job, final, judge) for job in jobs if (final := job.final) is not None]


def result_row(job: Job, final: Mapping[str, Any], judge: Judge) -> RunRow:
    """Return the row of a finished run in comparison.jsonl: `metric` is the task's own (`task_metric`) or "loss", as
    `judge` says; `metrics` has all of the last evaluation."""
    loss, own = _number(final["eval_loss"]), _number(final["value"])
    metrics = {name: _number(value) for name, value in final["metrics"].items()}
    if not math.isfinite(loss):  # a diverged model still has an accuracy, of the one class it predicts
        own, metrics = math.nan, dict.fromkeys(metrics, math.nan)
    return {
        "method": job.entry.method,
        "task": job.entry.task,
        "seed": job.seed,
        "metric": "loss" if judge == "loss" else final["metric"],
        "value": loss if judge == "loss" else own,
        **{key: final[key] for key in ("trainable_parameters", "seconds", "peak_memory_bytes")},
        "learning_rate": job.rate,
        "budget": job.entry.budget,
        "eval_loss": loss,
        "task_metric": final["metric"],
        "metrics": metrics,
        "run": str(job.run),
    }


def _number(value: float | None) -> float:
    """Read null, which stands for NaN and infinities in JSON."""
    return math.nan if value is None else value


def choose_rate(rows: Sequence[RunRow]) -> float | None:
    """Return the rate with the best mean value over the tuning runs of an entry; None where no run has ended.

    A tie goes to the lower loss, then to the lower rate. A rate whose runs diverged is chosen last. Only the rates with
    the most seeds are compared: a run that failed is reported elsewhere.
    """
    seeds = Counter(row["learning_rate"] for row in rows)
    candidates = [rate for rate, count in seeds.items() if count == max(seeds.values())]

    def order(rate: float) -> tuple[float, float, float]:
        mine = [row for row in rows if row["learning_rate"] == rate]
        value = fmean(-sign(row["metric"]) * row["value"] for row in mine)
        loss = fmean(row["eval_loss"] for row in mine)
        return (value if math.isfinite(value) else math.inf, loss if math.isfinite(loss) else math.inf, rate)

    return min(candidates, key=order, default=None)


@dataclass(frozen=True)
class RateCurve:
    """The tuning runs of an entry, and the rate that they choose."""

    entry: Entry
    rates: Sequence[float]
    """All rates of the grid, lowest first."""
    rows: Sequence[RunRow]

    @property
    def best_rate(self) -> float | None:
        return choose_rate(self.rows)

    @property
    def edge(self) -> str:
        """Return "lowest" or "highest" where a better rate may lie beyond the end of the grid."""
        return {self.rates[0]: "lowest", self.rates[-1]: "highest"}.get(self.best_rate or 0.0, "")


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, finished or not."""

    grid: Grid
    rows: Sequence[RunRow]
    curves: Sequence[RateCurve]
    """Entries with a single rate have none."""
    failed: Sequence[JobEnd] = ()
    missing: int = 0
    """Reported runs of the grid that have not ended."""

    def values(self, method: str, task: str, budget: int, key: str = "value") -> dict[int, Any]:
        """Return seed -> value of an entry's runs."""
        mine = (row for row in self.rows if (row["method"], row["task"], row["budget"]) == (method, task, budget))
        return {row["seed"]: row[key] for row in sorted(mine, key=lambda row: row["seed"])}

    def mean_of(self, key: str, method: str, budget: int) -> float | None:
        """Return the mean of a number over the runs of a row; None where it has none."""
        values = [row[key] for row in self.rows if (row["method"], row["budget"]) == (method, budget)]
        return fmean(values) if values else None

    def ratio(self, key: str, method: str, budget: int) -> float | None:
        """Return a number relative to the baseline's, summed over the tasks and seeds where both have runs."""
        by_row: dict[str, dict[tuple[str, int], float]] = {method: {}, self.grid.baseline: {}}
        for row in self.rows:
            if row["method"] in by_row and row["budget"] == budget:
                by_row[row["method"]][row["task"], row["seed"]] = row[key]
        ours, theirs = by_row[method], by_row[self.grid.baseline]
        shared = ours.keys() & theirs.keys()
        total = sum(theirs[run] for run in shared)
        return sum(ours[run] for run in shared) / total if total else None

    def remarks(self) -> list[str]:
        """List few seeds, failures, missing runs, and rates at an edge."""
        lines = []
        if 1 < (seeds := len(self.grid.seeds)) < 5:
            lines.append(
                f"{seeds} seeds: the 95 % intervals are wide, {reach(seeds):.3g} standard errors to each side; with "
                f"five seeds they are {reach(5):.3g}"
            )
        lines += [f"failed: {end.job.label}: {end.message}" for end in self.failed]
        waiting = self.missing - sum(end.job.purpose == "jobs" for end in self.failed)
        if waiting > 0:
            lines.append(f"{waiting} reported runs are missing")
        for row in self.rows:
            if not math.isfinite(row["value"]):
                entry = Entry(row["method"], row["task"], row["budget"])
                lines.append(f"diverged: {entry}, seed {row['seed']}, rate {row['learning_rate']:g}")
        for curve in self.curves:
            if curve.best_rate is None:
                lines.append(f"no learning rate could be chosen for {curve.entry}")
            elif curve.edge:
                best = f"the best rate, {curve.best_rate:g}, is the {curve.edge} of its grid"
                lines.append(f"warning: {curve.entry}: {best}; widen it")
        return lines
