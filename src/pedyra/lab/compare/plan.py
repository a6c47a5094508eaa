"""A plan counts the runs of a comparison that are left, and estimates their time on a GPU and here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache

import torch

from pedyra.app.models.base import positions
from pedyra.app.recipe import check_recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.lab.compare.jobs import Job
from pedyra.lab.compare.prepare import Experiment

TERAFLOPS = 100
"""An A100 reaches about this rate in bfloat16, a third of its peak."""

START_SECONDS = 15
"""A run takes about so long beside its training: `pedyra train` of a tiny model, 24 steps in 1.3 s, took 16 and 18 s on
two busy cores."""


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, or of several, and the cost of those that are left."""

    runs: int
    done: int
    gpu_hours: float
    seconds_here: float
    """The missing runs take so long on this machine, one after the other."""

    def __add__(self, other: Plan) -> Plan:
        hours, seconds = self.gpu_hours + other.gpu_hours, self.seconds_here + other.seconds_here
        return Plan(self.runs + other.runs, self.done + other.done, hours, seconds)

    def __str__(self) -> str:
        hours = "less than 0.01" if self.gpu_hours < 0.01 else f"about {self.gpu_hours:.2g}"
        return (
            f"{self.runs} runs, {self.done} of them done; the others train for {hours} GPU hours (at {TERAFLOPS} "
            f"teraflops a second), or about {self.seconds_here / 60:,.0f} minutes on this machine; rows are of full "
            f"length, and evaluations left out"
        )


@cache
def teraflops_here(dtype: torch.dtype) -> float:
    """Measure the rate of this machine, as a third of that of a product of matrices in this dtype: processors have
    units for bfloat16 that are eight times as fast as theirs for float32, or none."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    (a @ a @ a @ a).sum().item()
    start = time.perf_counter()
    (a @ a @ a @ a).sum().item()  # three products
    return 2 * 1024**3 / (time.perf_counter() - start) / 1e12


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
    plan = Plan(len(jobs), len(jobs) - len(pending), 0.0, 0.0)
    return sum((_plan_of(experiment, job) for job in pending), plan)


def _plan_of(experiment: Experiment, job: Job) -> Plan:
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
    teraflops = 4 * experiment.weights[recipe.data.kind] * tokens / 1e12
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    return Plan(0, 0, teraflops / TERAFLOPS / 3600, START_SECONDS + teraflops / teraflops_here(dtype))
