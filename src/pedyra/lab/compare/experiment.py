"""A grid made ready to run: its entries, their rows split, what was matched, and the recipe of every job."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedyra.app.recipe import Recipe, check_recipe
from pedyra.app.recipe_sections import LoraSection
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.tasks.named_tasks import task_data, task_model
from pedyra.lab.compare import matching
from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import Entry, Job, Purpose, final_row
from pedyra.lab.compare.matching import Matched
from pedyra.lab.compare.results import RateCurve, choose_rate, collect
from pedyra.lab.compare.splits import TaskSplits, split_task
from pedyra.lora.files import read_json, write_file
from pedyra.pe_dyra.method import PeDyra

RunJobs = Callable[[Sequence[Job]], None]


@dataclass(frozen=True)
class Experiment:
    """A grid whose data is split and whose rows are matched."""

    grid: Grid
    folder: Path
    splits: Mapping[str, TaskSplits]
    matched: Mapping[Entry, Matched]

    @classmethod
    def without_data(cls, grid: Grid) -> Experiment:
        """One that can only find the results of its jobs, not run them."""
        return cls(grid, Path(grid.output_dir), {}, {})

    @property
    def entries(self) -> list[Entry]:
        """Rows x tasks x budgets."""
        grid = self.grid
        return [
            Entry(method, task, budget) for budget in grid.all_budgets for task in grid.tasks for method in grid.methods
        ]

    def job(self, entry: Entry, rate: float, seed: int, purpose: Purpose) -> Job:
        job = Job(entry, rate, seed, purpose, self.folder, {})
        if entry.task in self.splits:
            data = getattr(self.splits[entry.task], "tuning" if purpose == "tuning" else "reported")
            matched = self.matched.get(entry, Matched(entry.budget))
            content = recipe_content(self.grid, entry, data, matched, rate, seed)
            job.recipe.update({"name": entry.task, "output_dir": str(job.run), **content})
        return job

    def tuning_jobs(self, entry: Entry) -> list[Job]:
        """One per rate and tuning seed; none where there is nothing to choose."""
        rates = self.grid.rates(entry.method)
        seeds = self.grid.tuning.seeds if len(rates) > 1 else []
        return [self.job(entry, rate, seed, "tuning") for rate in rates for seed in seeds]

    def curves(self, folders: Sequence[Path]) -> dict[Entry, RateCurve]:
        """The learning-rate curves of the entries that choose among several rates."""
        found = {}
        for entry in self.entries:
            if jobs := self.tuning_jobs(entry):
                found[entry] = choose_rate(
                    entry, self.grid.rates(entry.method), collect(jobs, folders, self.grid.judge)
                )
        return found

    def reported_jobs(self, entry: Entry, curves: Mapping[Entry, RateCurve]) -> list[Job]:
        """One per seed, at the chosen rate, or the only one; none where tuning chose none."""
        rate = curves[entry].chosen if entry in curves else self.grid.rates(entry.method)[0]
        return [] if rate is None else [self.job(entry, rate, seed, "jobs") for seed in self.grid.seeds]


def prepare_experiment(grid: Grid, folder: Path, run_jobs: RunJobs) -> Experiment:
    """Split the data, check every row's recipe, and match the rows.

    Args:
        run_jobs: runs the jobs that matching by time measures.

    Raises:
        ValueError: a mistake in a recipe, or a row that cannot be matched within 5 %.
    """
    sections = {label: _data_section(grid, label) for label in grid.tasks}
    splits = {
        label: split_task(label, section, grid.tuning, grid.split_seed, folder / "data" / label)
        for label, section in sections.items()
    }
    bare = Experiment(grid, folder, splits, {})
    recipes = {entry: _row_recipe(bare, entry) for entry in bare.entries}
    return Experiment(grid, folder, splits, _match(bare, recipes, run_jobs))


def recipe_content(
    grid: Grid, entry: Entry, data: Mapping[str, Any], matched: Matched, rate: float, seed: int
) -> dict[str, Any]:
    """A job's recipe but for its name and folder: the grid's sections, the row's own over them, what was matched."""
    row = grid.methods[entry.method]
    alpha, r = grid.lora.get("alpha", LoraSection().alpha), matched.r * (row.wide or 1)
    if r != grid.base_rank:
        alpha = alpha * r / grid.base_rank  # the scaling alpha / r stays
    end = {} if row.wide is None else {"target_rank": matched.r}
    steps = {} if matched.max_steps is None else {"max_steps": matched.max_steps}
    bits = {} if row.quantization is None else {"quantization": row.quantization}
    return {
        "method": row.method,
        "seed": seed,
        "model": task_model(data, grid.model) | bits,
        "data": dict(data),
        "lora": {**grid.lora, **row.lora, "r": r, "alpha": alpha},
        "rank": {**grid.rank, **row.rank, **end},
        "method_settings": {**row.method_settings, **matched.method_settings},
        "training": {**grid.training, **row.training, "learning_rate": rate, **steps},
        **({"generate": grid.generate} if grid.generate else {}),
    }


def _data_section(grid: Grid, label: str) -> Any:
    """The task's section, checked as part of a recipe, which tells a mistake in one line."""
    data = task_data(label, grid.tasks[label], grid.data_dir)
    return check_recipe({"name": label, "model": task_model(data, grid.model), "data": data}, f"tasks.{label}").data


def _row_recipe(experiment: Experiment, entry: Entry) -> Recipe:
    job = experiment.job(entry, experiment.grid.rates(entry.method)[0], experiment.grid.seeds[0], "jobs")
    where = f"methods.{entry.method} on {entry.task}"
    recipe = matching.checked(job.recipe, where)
    try:
        training_arguments(recipe)
        if recipe.method == "pedyra" and (steps := recipe.training.get("max_steps", -1)) > 0:
            PeDyra(**recipe.rank).method().schedule(steps)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return recipe


def _match(experiment: Experiment, recipes: Mapping[Entry, Recipe], run_jobs: RunJobs) -> dict[Entry, Matched]:
    """What is matched for every entry; kept in matching.json, so that a resumed comparison has the same jobs."""
    grid, file = experiment.grid, experiment.folder / "matching.json"
    matched_before = {"r": int, "method_settings": dict, "max_steps": (int, None)}
    known: dict[str, Any] = read_json(file, {str: matched_before}) if file.is_file() else {}
    counts: dict[str, matching.ParameterCount] = {}
    found = {}
    for entry, recipe in recipes.items():
        kind, how = recipe.data.kind, grid.match_of(entry.method)
        baseline = Entry(grid.baseline, entry.task, entry.budget)
        # The head is left out, so tasks of one kind are matched alike, except by what was measured on the task.
        key = f"{entry.method} {entry.task if how in ('time', 'memory') else kind} r{entry.budget}"
        if key not in known:
            if how == "rank" or (entry == baseline and how != "parameters"):
                matched = Matched(entry.budget)
            elif how == "parameters":
                if kind not in counts:
                    counts[kind] = matching.ParameterCount(recipes[baseline])
                matched = matching.match_parameters(entry.method, recipe, entry.budget, recipes[baseline], counts[kind])
            elif how == "memory":
                matched = matching.match_memory(entry.method, recipe, entry.budget, recipes[baseline])
            else:
                matched = _match_time(experiment, entry, baseline, run_jobs)
            known[key] = matched.to_dict()
            write_file(file, json.dumps(known, indent=2) + "\n")
        found[entry] = Matched(**known[key])
    return found


def _match_time(experiment: Experiment, entry: Entry, baseline: Entry, run_jobs: RunJobs) -> Matched:
    grid = experiment.grid
    jobs = [
        experiment.job(place, grid.rates(place.method)[0], grid.tuning.seeds[0], "timing")
        for place in (entry, baseline)
    ]
    run_jobs(jobs)
    ours, theirs = (final_row(job.run) for job in jobs)
    if ours is None or theirs is None:
        raise ValueError(f"method {entry.method} on {entry.task} cannot be matched by time: its timing run failed")
    return matching.match_steps(entry.budget, ours["step"], ours["seconds"], theirs["seconds"])
