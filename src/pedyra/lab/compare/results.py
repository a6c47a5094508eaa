"""What the jobs of a comparison came to, collected from one folder or several, and the learning rates they chose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedyra.lab.compare.grid import Judge
from pedyra.lab.compare.jobs import Entry, Job, final_row
from pedyra.lab.compare.statistics import mean
from pedyra.lora.files import read_rows

LOWER_IS_BETTER = ("loss", "perplexity", "relative_error")
NOT_A_METRIC = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Result:
    """One finished run."""

    entry: Entry
    rate: float
    seed: int
    metric: str
    """What is judged: the task's metric, or "loss"."""
    value: float
    task_metric: str
    """The task's own metric, whatever is judged; its value is in `metrics`."""
    eval_loss: float
    trainable_parameters: int
    seconds: float
    peak_memory_bytes: int
    metrics: dict[str, float]
    """Every metric of the last evaluation but the loss."""
    run: Path

    def row(self) -> dict[str, Any]:
        """For JSON lines."""
        return {
            "method": self.entry.method,
            "task": self.entry.task,
            "seed": self.seed,
            "metric": self.metric,
            "value": self.value,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "budget": self.entry.budget,
            "learning_rate": self.rate,
            "eval_loss": self.eval_loss,
            "peak_memory_bytes": self.peak_memory_bytes,
            "metrics": self.metrics,
            "run": str(self.run),
        }


def sign(metric: str) -> int:
    """1 if more is better, -1 if less is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def collect(jobs: Iterable[Job], folders: Sequence[Path], judge: Judge) -> list[Result]:
    """The results of the jobs that are finished in any of the folders; the first folder that has one is taken."""
    found = []
    for job in jobs:
        results = (_read(job, folder / job.place, judge) for folder in folders)
        result = next((result for result in results if result is not None), None)
        if result is not None:
            found.append(result)
    return found


def _read(job: Job, run: Path, judge: Judge) -> Result | None:
    final = final_row(run)
    if final is None:
        return None
    loss = _number(final["eval_loss"])
    metric, value = ("loss", loss) if judge == "loss" else (final["metric"], _number(final["value"]))
    if not math.isfinite(loss):  # a model whose loss is no number still has an accuracy, of the class it always says
        value = math.nan
    judged = {"metric": metric, "value": value, "task_metric": final["metric"], "eval_loss": loss}
    costs = {key: final[key] for key in ("trainable_parameters", "seconds", "peak_memory_bytes")}
    metrics = _last_metrics(run, final)
    return Result(entry=job.entry, rate=job.rate, seed=job.seed, metrics=metrics, run=run, **judged, **costs)


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


def choose_rate(entry: Entry, rates: Sequence[float], results: Sequence[Result]) -> RateCurve:
    """The rate with the best mean value over the tuning seeds; a tie goes to the lower loss, then the lower rate.

    A rate whose runs diverged (no finite value) is chosen last; one without any result is not chosen. Rates are
    compared by the seeds they have: a run that failed is reported elsewhere.
    """
    points = []
    metric = next((result.metric for result in results if result.entry == entry), "")
    for rate in sorted(rates):
        mine = [result for result in results if result.entry == entry and result.rate == rate]
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
