"""What the results of a comparison say: values, differences to the baseline, costs, standings, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import Entry, Outcome
from pedyra.lab.compare.matching import TOLERANCE
from pedyra.lab.compare.results import RateCurve, Result, sign
from pedyra.lab.compare.statistics import PairedDifference, compare_paired, mean, rank_best, standard_error


@dataclass(frozen=True)
class Comparison:
    """Everything that is known of a comparison, finished or not."""

    grid: Grid
    results: Sequence[Result]
    curves: Sequence[RateCurve]
    """Of the rows that choose among several rates."""
    failed: Sequence[Outcome] = ()
    missing: int = 0
    """Reported runs of the grid that are not there."""

    def rows(self) -> list[dict[str, Any]]:
        """One a reported run, for JSON lines."""
        return [result.row() for result in self.results]

    @property
    def reference(self) -> str:
        """The row that parameters, time and memory are relative to: lora where it is one, else the baseline."""
        return "lora" if "lora" in self.grid.methods else self.grid.baseline

    def of(self, method: str, task: str, budget: int) -> list[Result]:
        """The results of one entry, by seed."""
        entry = Entry(method, task, budget)
        return sorted((result for result in self.results if result.entry == entry), key=lambda result: result.seed)

    def values(self, method: str, task: str, budget: int, *, oriented: bool = False) -> dict[int, float]:
        """Seed -> value; `oriented`: so that more is better."""
        return {
            result.seed: result.value * (sign(result.metric) if oriented else 1)
            for result in self.of(method, task, budget)
        }

    def difference(self, method: str, task: str, budget: int) -> PairedDifference | None:
        """How much better a row is than the baseline; None where no seed is shared."""
        ours = self.values(method, task, budget, oriented=True)
        return compare_paired(ours, self.values(self.grid.baseline, task, budget, oriented=True))

    def standing(self, task: str, budget: int) -> dict[str, str]:
        """Row -> "best" (alone, by every interval), or "tied" with the best; nothing for the others."""
        values = {name: self.values(name, task, budget, oriented=True) for name in self.grid.methods}
        ranking = rank_best(values)
        if ranking is None or sum(map(bool, values.values())) < 2:
            return {}
        if not ranking.tied:
            return {ranking.best: "best"}
        return dict.fromkeys((ranking.best, *ranking.tied), "tied")

    def cost(self, key: str, method: str, budget: int, task: str | None = None) -> float | None:
        """Mean of trainable_parameters, seconds or peak_memory_bytes over the runs of a row."""
        tasks = self.grid.tasks if task is None else [task]
        runs = [getattr(result, key) for name in tasks for result in self.of(method, name, budget)]
        return mean(runs) if runs else None

    def ratio(self, key: str, method: str, budget: int, task: str | None = None) -> float | None:
        """Cost relative to the reference, from the tasks where both have runs."""
        tasks = self.grid.tasks if task is None else [task]
        shared = [
            (ours, theirs)
            for name in tasks
            if (ours := self.cost(key, method, budget, name)) is not None
            and (theirs := self.cost(key, self.reference, budget, name))
        ]
        return sum(ours for ours, _ in shared) / sum(theirs for _, theirs in shared) if shared else None

    def metric(self, task: str) -> str:
        return next((result.metric for result in self.results if result.entry.task == task), "")


def remarks(comparison: Comparison) -> list[str]:
    """What a reader must know: failures, missing runs, rates at an edge, parameters that are not equal."""
    found = [f"failed: {outcome.job.label}: {outcome.message}" for outcome in comparison.failed]
    waiting = comparison.missing - sum(outcome.job.purpose == "jobs" for outcome in comparison.failed)
    if waiting > 0:
        found.append(f"{waiting} reported runs are missing; run every --shard (--collect runs nothing)")
    for result in comparison.results:
        if not math.isfinite(result.value):
            where = f"{result.entry.method} on {result.entry.task}, r = {result.entry.budget}, seed {result.seed}"
            found.append(f"diverged: {where}, rate {result.rate:g}")
    for curve in comparison.curves:
        where = f"{curve.entry.method} on {curve.entry.task}, r = {curve.entry.budget}"
        if curve.chosen is None:
            found.append(f"no learning rate could be chosen for {where}")
        elif curve.at_edge:
            side = "lowest" if curve.chosen == curve.points[0].rate else "highest"
            found.append(f"warning: {where}: the best rate, {curve.chosen:g}, is the {side} of its grid; widen it")
    for budget in comparison.grid.all_budgets:
        for method in comparison.grid.methods:
            ratio = comparison.ratio("trainable_parameters", method, budget)
            if comparison.grid.match == "parameters" and ratio is not None and abs(ratio - 1) > TOLERANCE:
                than = f"{ratio:.2f} times the trainable parameters of {comparison.reference}"
                found.append(f"warning: {method}, r = {budget}, has {than}")
    return found


def csv_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row per budget, task and method, numbers unrounded."""
    rows = []
    for budget in comparison.grid.all_budgets:
        for task in comparison.grid.tasks:
            standing = comparison.standing(task, budget)
            for method in comparison.grid.methods:
                results = comparison.of(method, task, budget)
                if results:
                    rows.append(_csv_row(comparison, results, standing.get(method, "")))
    return rows


def _csv_row(comparison: Comparison, results: list[Result], standing: str) -> dict[str, Any]:
    entry = results[0].entry
    values = [result.value for result in results]
    difference = comparison.difference(entry.method, entry.task, entry.budget)
    row: dict[str, Any] = {
        "method": entry.method,
        "task": entry.task,
        "budget": entry.budget,
        "metric": results[0].metric,
        "seeds": len(values),
        "mean": mean(values),
        "standard_error": standard_error(values),
        "standing": standing,
        "learning_rate": results[0].rate,
    }
    if difference is not None:
        low, high = difference.interval or (None, None)
        row |= {"difference": difference.mean, "interval_low": low, "interval_high": high}
        row |= {f"seeds_{key}": getattr(difference.sign, key) for key in ("wins", "losses", "ties")}
        row["sign_test_p"] = difference.sign.p
    for key in ("trainable_parameters", "seconds", "peak_memory_bytes"):
        row[key] = comparison.cost(key, entry.method, entry.budget, entry.task)
        row[f"{key}_ratio"] = comparison.ratio(key, entry.method, entry.budget, entry.task)
    return row
