"""Results are found in any folder, and the rate is chosen by what the tuning runs show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pedyra.lab.compare.jobs import Entry, Job
from pedyra.lab.compare.results import RateCurve, choose_rate, collect

CELL = Entry("lora", "toy", 2)
COSTS = {"step": 4, "final": True, "seconds": 1.5, "peak_memory_bytes": 7, "trainable_parameters": 3}


def result(rate: float, value: float, seed: int = 0, *, metric: str = "accuracy", loss: float = 1.0) -> dict[str, Any]:
    return {"learning_rate": rate, "value": value, "seed": seed, "metric": metric, "eval_loss": loss}


def test_the_rate_with_the_best_mean_over_seeds_wins():
    values = {1: (0.9, 0.1), 2: (0.6, 0.6), 3: (0.5, 0.5)}
    tuned = [result(rate, value, seed) for rate, both in values.items() for seed, value in enumerate(both)]
    curve = RateCurve(CELL, [1, 2, 3], tuned)
    assert curve.best_rate == 2 and not curve.edge


@pytest.mark.parametrize("metric", ["perplexity", "loss"])
def test_less_perplexity_or_loss_is_better(metric):
    tuned = [result(rate, value, metric=metric) for rate, value in ((1, 9.0), (2, 4.0), (3, 5.0))]
    assert choose_rate(tuned) == 2


def test_a_tie_goes_to_the_lower_loss_and_then_to_the_lower_rate():
    assert choose_rate([result(1, 0.5, loss=0.9), result(2, 0.5, loss=0.3)]) == 2
    assert choose_rate([result(2, 0.5), result(1, 0.5)]) == 1


@pytest.mark.parametrize(("best", "edge"), [(1, "lowest"), (3, "highest")])
def test_the_edge_of_the_grid_is_noticed(best, edge):
    tuned = [result(rate, 0.9 if rate == best else 0.1) for rate in (1, 2, 3)]
    assert RateCurve(CELL, [1, 2, 3], tuned).edge == edge


def test_a_run_that_diverged_is_chosen_last_and_one_that_is_missing_never():
    tuned = [result(1, math.inf, metric="perplexity"), result(2, 90.0, metric="perplexity")]
    assert choose_rate(tuned) == 2
    assert choose_rate(tuned[:1]) == 1
    assert choose_rate([]) is None and not RateCurve(CELL, [1, 3], []).edge


def test_rates_are_compared_over_the_same_seeds():
    """A run of the lower rate that failed leaves the easier seed."""
    first = [result(1, 0.40), result(1, 0.60)]
    assert choose_rate([*first, result(3, 0.45), result(3, 0.62)]) == 3
    assert choose_rate([*first, result(3, 0.62)]) == 1


def test_a_run_whose_loss_is_no_number_is_no_result_however_accurate(tmp_path):
    """It predicts one class for all rows, which may be the accuracy of a model that has learned nothing yet."""
    jobs = [Job(CELL, rate, 0, "tuning", tmp_path, {}) for rate in (0.1, 1e10)]
    write_run(
        jobs[0].run, {**COSTS, "metric": "accuracy", "value": 0.4, "eval_loss": 0.7, "metrics": {"accuracy": 0.4}}
    )
    write_run(
        jobs[1].run, {**COSTS, "metric": "accuracy", "value": 0.6, "eval_loss": None, "metrics": {"accuracy": 0.6}}
    )
    learned, diverged = collect(jobs, "metric")
    assert learned["value"] == 0.4 and math.isnan(diverged["value"]) and math.isnan(diverged["eval_loss"])
    assert learned["metrics"] == {"accuracy": 0.4} and math.isnan(diverged["metrics"]["accuracy"])
    assert choose_rate([learned, diverged]) == 0.1
    by_loss = collect(jobs, "loss")
    assert choose_rate(by_loss) == 0.1 and math.isnan(by_loss[1]["value"])


@pytest.mark.parametrize("judge", ["metric", "loss"])
def test_a_metric_that_is_no_number_is_none_in_the_file_and_nan_here(tmp_path, judge):
    job = Job(CELL, 0.1, 0, "jobs", tmp_path, {})
    final = {"metric": "perplexity", "value": None, "eval_loss": 750.0, "metrics": {"perplexity": None}}
    write_run(job.run, {**COSTS, **final})
    (row,) = collect([job], judge)
    assert math.isnan(row["metrics"]["perplexity"])
    assert math.isnan(row["value"]) if judge == "metric" else row["value"] == 750.0


def write_run(run: Path, row: dict) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_unfinished_runs_have_no_result(tmp_path):
    jobs = [Job(CELL, 0.1, seed, "jobs", tmp_path, {}) for seed in (0, 1)]
    metrics = {"f1": 0.5, "accuracy": 0.75}
    write_run(jobs[0].run, {**COSTS, "metric": "f1", "value": 0.5, "eval_loss": 0.2, "metrics": metrics})
    write_run(jobs[1].run, {"step": 4, "eval_loss": 0.2, "eval_f1": 0.5})
    (first,) = collect(jobs, "metric")
    assert (first["seed"], first["metrics"]) == (0, metrics)
    assert list(first)[:7] == ["method", "task", "seed", "metric", "value", "trainable_parameters", "seconds"]
    assert [first[key] for key in ("method", "trainable_parameters", "learning_rate")] == ["lora", 3, 0.1]


def test_the_loss_can_be_judged_and_the_tasks_metric_is_kept(tmp_path):
    job = Job(CELL, 0.1, 0, "jobs", tmp_path, {})
    final = {"metric": "f1", "value": 0.5, "eval_loss": 0.2, "metrics": {"f1": 0.5}}
    write_run(job.run, {**COSTS, **final})
    (judged,) = collect([job], "loss")
    assert (judged["metric"], judged["value"]) == ("loss", 0.2)
    assert judged["metrics"][judged["task_metric"]] == 0.5
