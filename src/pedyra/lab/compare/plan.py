"""A plan counts the runs of a comparison that are left, and estimates their hours on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pedyra.app.models.base import positions
from pedyra.app.recipe import check_recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.lab.compare.jobs import Job
from pedyra.lab.compare.prepare import Experiment

TERAFLOPS = 100
"""An A100 reaches about this rate in bfloat16, a third of its peak."""


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, or of several, and the cost of those that are left."""

    runs: int
    done: int
    gpu_hours: float

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.runs + other.runs, self.done + other.done, self.gpu_hours + other.gpu_hours)

    def __str__(self) -> str:
        hours = "less than 0.01" if self.gpu_hours < 0.01 else f"about {self.gpu_hours:.2g}"
        return (
            f"{self.runs} runs, {self.done} of them done; the others train for {hours} GPU hours (at {TERAFLOPS} "
            f"teraflops a second; rows are of full length, and evaluations left out)"
        )


def plan_experiment(experiment: Experiment) -> Plan:
    """Count the runs of a comparison, tuning runs included, and add up the cost of the missing ones, which is the same
    at every rate."""
    jobs: list[Job] = []
    for entry in experiment.entries:
        tuning = experiment.tuning_jobs(entry)
        rates = experiment.grid.rates(entry.method)
        # At the rate at which most runs are done, else at the first.
        candidates = [experiment.reported_jobs(entry, {entry: rate}) for rate in rates]
        jobs += tuning + max(candidates, key=lambda each: sum(job.final is not None for job in each))
    pending = [job for job in jobs if job.final is None]
    return Plan(len(jobs), len(jobs) - len(pending), sum(gpu_hours(experiment, job) for job in pending))


def gpu_hours(experiment: Experiment, job: Job) -> float:
    """Estimate the training of a run: 4 floating-point operations for each frozen weight and token, two to go forward
    and two to go back to the inputs of every layer."""
    recipe = check_recipe(dict(job.recipe), "recipe")
    arguments = training_arguments(recipe)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    if (steps := arguments.max_steps) <= 0:
        with open(job.recipe["data"]["source"], "rb") as file:
            rows = sum(1 for _ in file)
        steps = math.ceil(min(rows, recipe.data.train_rows or rows) / batch) * arguments.num_train_epochs
    tokens = batch * steps * (recipe.data.max_length or positions(recipe.model) or 0)
    operations = 4 * experiment.weights[recipe.data.kind] * tokens
    return operations / (TERAFLOPS * 1e12) / 3600
