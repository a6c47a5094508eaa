"""What the jobs of a comparison came to: results, the learning rates they chose, differences, standings, remarks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pedyra.fitting.cut import RECORD
from pedyra.lab.compare.grid import Grid, Judge
from pedyra.lab.compare.jobs import Entry, Job, Outcome, final_row
from pedyra.lab.compare.matching import TOLERANCE
from pedyra.lab.compare.statistics import PairedDifference, compare_paired, mean, rank_best
from pedyra.lora.files import read_json, read_rows

LOWER_IS_BETTER = ("loss", "perplexity", "relative_error")
NOT_A_METRIC = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Result:
    """One finished run."""

    entry: Entry
    seed: int
    metric: str
    """What is judged: the task's metric, or "loss"."""
    value: float
    trainable_parameters: int
    seconds: float
    learning_rate: float
    eval_loss: float
    peak_memory_bytes: int
    metrics: dict[str, float]
    """Every metric of the last evaluation but the loss."""
    task_metric: str
    """The task's own metric, whatever is judged; its value is in `metrics`."""
    run: str
    """Its folder."""
    fit_parameters: int | None = None
    """Of the smaller adapter that the run's section `fit` found; None where it has none."""
    fit_increase: float | None = None
    """What the loss rose by with it, on rows that had no part in the choice: 0 where the whole adapter was kept."""

    def row(self) -> dict[str, Any]:
        """For JSON lines."""
        row = asdict(self)
        entry = row.pop("entry")
        return {"method": entry.pop("method"), "task": entry.pop("task"), **row, **entry}


def sign(metric: str) -> int:
    """1 if more is better, -1 if less is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def collect(jobs: Iterable[Job], judge: Judge) -> list[Result]:
    """The results of the jobs that are finished."""
    return [_read(job, final, judge) for job in jobs if (final := final_row(job.run)) is not None]


def _read(job: Job, final: dict[str, Any], judge: Judge) -> Result:
    loss = _number(final["eval_loss"])
    metric, value = ("loss", loss) if judge == "loss" else (final["metric"], _number(final["value"]))
    if not math.isfinite(loss):  # a model whose loss is no number still has an accuracy, of the class it always says
        value = math.nan
    judged = {"metric": metric, "value": value, "task_metric": final["metric"], "eval_loss": loss}
    took = {key: final[key] for key in ("trainable_parameters", "seconds", "peak_memory_bytes")}
    found = {"metrics": _last_metrics(job.run, final), "run": str(job.run), **_fit(job.run)}
    return Result(entry=job.entry, seed=job.seed, learning_rate=job.rate, **judged, **took, **found)


def _fit(run: Path) -> dict[str, Any]:
    file = run / "fit" / RECORD
    if not file.is_file():
        return {}
    found = read_json(file, {"parameters": int, "measured_increase": (float, None)})
    return {"fit_parameters": found["parameters"], "fit_increase": found["measured_increase"] or 0.0}


def _last_metrics(run: Path, final: dict[str, Any]) -> dict[str, float]:
    """All metrics of the evaluation that the final line is from; the task's own alone if that one was not logged.

    A method may change the model after its last logged evaluation (PARA cuts ranks), which is then not the final one.
    """
    own = final["metric"]
    if final["value"] is None:
        return {own: math.nan}
    for row in reversed(read_rows(run / "metrics.jsonl")[:-1]):
        if row.get(f"eval_{own}") == final["value"] and row["step"] == final["step"]:
            names = {key: key.removeprefix("eval_") for key in row if key.startswith("eval_")}
            return {name: _number(row[key]) for key, name in names.items() if name not in NOT_A_METRIC}
    return {own: final["value"]}


def _number(value: float | None) -> float:
    """JSON has null for what is no finite number."""
    return math.nan if value is None else value


@dataclass(frozen=True)
class RatePoint:
    """One learning rate of a curve."""

    rate: float
    values: dict[int, float]
    """By tuning seed."""
    loss: float
    """Mean evaluation loss on the tuning rows; breaks ties."""

    @property
    def value(self) -> float:
        """Mean over the tuning seeds; nan if one diverged."""
        return mean(list(self.values.values())) if self.values else math.nan


@dataclass(frozen=True)
class RateCurve:
    """How a method does over its learning rates on the tuning rows, and the rate it is reported at."""

    entry: Entry
    points: list[RatePoint]
    """Of every rate of the grid, lowest first."""
    chosen: float | None
    """None if no rate has a result."""
    metric: str

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of the grid, so that a better one may lie outside of it."""
        return self.chosen in (self.points[0].rate, self.points[-1].rate) and len(self.points) > 1

    def rows(self) -> list[dict[str, Any]]:
        """One a rate and seed, for JSON lines."""
        shared = {**asdict(self.entry), "metric": self.metric}
        return [
            {**shared, "learning_rate": point.rate, "seed": seed, "value": value, "chosen": point.rate == self.chosen}
            for point in self.points
            for seed, value in point.values.items()
        ]


def choose_rate(entry: Entry, rates: Sequence[float], results: Sequence[Result]) -> RateCurve:
    """The rate with the best mean value over the tuning seeds; a tie goes to the lower loss, then the lower rate.

    A rate whose runs diverged (no finite value) is chosen last; one without any result is not chosen. Rates are
    compared by the seeds they have: a run that failed is reported elsewhere.
    """
    points = []
    metric = next((result.metric for result in results if result.entry == entry), "")
    for rate in sorted(rates):
        mine = [result for result in results if result.entry == entry and result.learning_rate == rate]
        loss = mean([result.eval_loss for result in mine]) if mine else math.nan
        points.append(RatePoint(rate, {result.seed: result.value for result in mine}, loss))

    def order(point: RatePoint) -> tuple[float, float, float]:
        value = sign(metric) * point.value
        return (
            -value if math.isfinite(value) else math.inf,
            point.loss if math.isfinite(point.loss) else math.inf,
            point.rate,
        )

    judged = [point for point in points if point.values]
    return RateCurve(entry, points, min(judged, key=order).rate if judged else None, metric)


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

    def mean_of(self, key: str, method: str, budget: int, task: str | None = None) -> float | None:
        """Mean of a number of `Result`, e.g. trainable_parameters or seconds, over the runs of a row that have it."""
        tasks = self.grid.tasks if task is None else [task]
        found = [getattr(result, key) for name in tasks for result in self.of(method, name, budget)]
        known = [value for value in found if value is not None]
        return mean(known) if known else None

    def ratio(self, key: str, method: str, budget: int, task: str | None = None) -> float | None:
        """`mean_of` relative to the reference's, from the tasks where both have runs."""
        tasks = self.grid.tasks if task is None else [task]
        shared = [
            (ours, theirs)
            for name in tasks
            if (ours := self.mean_of(key, method, budget, name)) is not None
            and (theirs := self.mean_of(key, self.reference, budget, name))
        ]
        return sum(ours for ours, _ in shared) / sum(theirs for _, theirs in shared) if shared else None

    def metric(self, task: str) -> str:
        return next((result.metric for result in self.results if result.entry.task == task), "")

    def remarks(self) -> list[str]:
        """What a reader must know: failures, missing runs, rates at an edge, parameters that are not equal."""
        found = [f"failed: {outcome.job.label}: {outcome.message}" for outcome in self.failed]
        waiting = self.missing - sum(outcome.job.purpose == "jobs" for outcome in self.failed)
        if waiting > 0:
            found.append(f"{waiting} reported runs are missing")
        for result in self.results:
            if not math.isfinite(result.value):
                found.append(f"diverged: {result.entry}, seed {result.seed}, rate {result.learning_rate:g}")
        for curve in self.curves:
            if curve.chosen is None:
                found.append(f"no learning rate could be chosen for {curve.entry}")
            elif curve.at_edge:
                side = "lowest" if curve.chosen == curve.points[0].rate else "highest"
                found.append(
                    f"warning: {curve.entry}: the best rate, {curve.chosen:g}, is the {side} of its grid; widen it"
                )
        for budget in self.grid.all_budgets:
            for method in self.grid.methods:
                ratio = self.ratio("trainable_parameters", method, budget)
                if self.grid.match == "parameters" and ratio is not None and abs(ratio - 1) > TOLERANCE:
                    than = f"{ratio:.2f} times the trainable parameters of {self.reference}"
                    found.append(f"warning: {method}, r = {budget}, has {than}")
        return found
