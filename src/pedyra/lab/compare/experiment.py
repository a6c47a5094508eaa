"""A grid made ready to run: its entries, their rows split, what was matched, and the recipe of every job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pedyra.app.recipe import Recipe, check_recipe
from pedyra.app.recipe_sections import LoraSection
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.setup import resolve
from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import Entry, Job, Purpose
from pedyra.lab.compare.matching import Matched, ParameterCount, match_parameters
from pedyra.lab.compare.named_tasks import task_data
from pedyra.lab.compare.results import RateCurve, choose_rate, collect
from pedyra.lab.compare.splits import TaskSplits, split_task
from pedyra.lora.files import read_json, write_file
from pedyra.methods.settings import SCHEDULE
from pedyra.methods.wide import Wide
from pedyra.pe_dyra.method import PeDyra


@dataclass(frozen=True)
class Experiment:
    """A grid whose data is split and whose rows are matched."""

    grid: Grid
    folder: Path
    splits: Mapping[str, TaskSplits]
    matched: Mapping[Entry, Matched]

    @property
    def entries(self) -> list[Entry]:
        """Rows x tasks x budgets."""
        grid = self.grid
        return [
            Entry(method, task, budget) for budget in grid.all_budgets for task in grid.tasks for method in grid.methods
        ]

    def job(self, entry: Entry, rate: float, seed: int, purpose: Purpose) -> Job:
        job = Job(entry, rate, seed, purpose, self.folder, {})
        name = {"name": entry.task, "output_dir": str(job.run), "seed": seed}
        job.recipe.update(name | self._content(entry, rate, purpose))
        return job

    def tuning_jobs(self, entry: Entry) -> list[Job]:
        """One per rate and tuning seed; none where there is nothing to choose."""
        rates = self.grid.rates(entry.method)
        seeds = self.grid.tuning.seeds if len(rates) > 1 else []
        return [self.job(entry, rate, seed, "tuning") for rate in rates for seed in seeds]

    def curves(self) -> dict[Entry, RateCurve]:
        """The learning-rate curves of the entries that choose among several rates."""
        judge, found = self.grid.judge, {}
        for entry in self.entries:
            if jobs := self.tuning_jobs(entry):
                found[entry] = choose_rate(entry, self.grid.rates(entry.method), collect(jobs, judge))
        return found

    def reported_jobs(self, entry: Entry, curves: Mapping[Entry, RateCurve]) -> list[Job]:
        """One per seed, at the chosen rate, or the only one; none where tuning chose none."""
        rate = curves[entry].chosen if entry in curves else self.grid.rates(entry.method)[0]
        return [] if rate is None else [self.job(entry, rate, seed, "jobs") for seed in self.grid.seeds]

    def _content(self, entry: Entry, rate: float, purpose: Purpose) -> dict[str, Any]:
        """A recipe: the grid's sections, the row's own over them, and what was matched."""
        grid, row = self.grid, self.grid.methods[entry.method]
        data = getattr(self.splits[entry.task], "tuning" if purpose == "tuning" else "reported")
        matched = self.matched.get(entry, Matched(entry.budget))
        alpha = grid.lora.get("alpha", LoraSection().alpha)
        if matched.r != grid.base_rank:
            alpha = alpha * matched.r / grid.base_rank  # the scaling alpha / r stays
        bits = {} if row.quantization is None else {"quantization": row.quantization}
        content = {
            "method": row.method,
            "model": grid.model | bits,
            "data": dict(data),
            "lora": {**grid.lora, **row.lora, "r": matched.r, "alpha": alpha},
            "rank": {**grid.rank, **row.rank},
            "method_settings": {**row.method_settings, **matched.method_settings},
            "training": {**grid.training, **row.training, "learning_rate": rate},
        }
        fit = grid.fit_of(entry.method)
        if purpose == "jobs" and fit is not None:
            content["fit"] = fit
        return {**content, "generate": grid.generate} if grid.generate else content


def prepare_experiment(grid: Grid, folder: Path) -> Experiment:
    """Split the data, check every row's recipe, and match the rows.

    Raises:
        ValueError: a mistake in a recipe, or a row that cannot be matched within 5 %.
    """
    sections = {label: _data_section(grid, label) for label in grid.tasks}
    splits = {
        label: split_task(label, section, grid.tuning.rows, folder / "data" / label)
        for label, section in sections.items()
    }
    bare = Experiment(grid, folder, splits, {})
    recipes = {entry: _row_recipe(bare, entry) for entry in bare.entries}
    return Experiment(grid, folder, splits, _match(bare, recipes))


def _data_section(grid: Grid, label: str) -> Any:
    """The task's section, checked as part of a recipe, which tells a mistake in one line."""
    data = task_data(label, grid.tasks[label], grid.data_dir)
    return check_recipe({"name": label, "model": grid.model, "data": data}, f"tasks.{label}").data


def _row_recipe(experiment: Experiment, entry: Entry) -> Recipe:
    """The recipe of a row, as its method resolves it; ValueError for what can be told from the recipe alone."""
    where = f"methods.{entry.method} on {entry.task}"
    job = experiment.job(entry, experiment.grid.rates(entry.method)[0], experiment.grid.seeds[0], "jobs")
    recipe = check_recipe(job.recipe, where)
    try:
        recipe = resolve(recipe)
        training_arguments(recipe)
        if (steps := recipe.training.get("max_steps", -1)) > 0 and recipe.method in ("pedyra", "wide"):
            schedule = {name: value for name, value in recipe.rank.items() if name in SCHEDULE}
            config = PeDyra(**schedule) if recipe.method == "pedyra" else Wide(rank=recipe.lora.r, **schedule)
            config.method().schedule(steps)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return recipe


def _match(experiment: Experiment, recipes: Mapping[Entry, Recipe]) -> dict[Entry, Matched]:
    """What is matched for every entry; kept in matching.json, so that a resumed comparison has the same jobs."""
    grid, file = experiment.grid, experiment.folder / "matching.json"
    known: dict[str, Any] = read_json(file, {str: {"r": int, "method_settings": dict}}) if file.is_file() else {}
    counts: dict[str, ParameterCount] = {}
    found = {}
    for entry, recipe in recipes.items():
        kind = recipe.data.kind
        key = f"{entry.method} {kind} r{entry.budget}"  # the head is left out: tasks of one kind are matched alike
        if grid.match_of(entry.method) == "rank":
            found[entry] = Matched(entry.budget)
            continue
        if key not in known:
            baseline = recipes[Entry(grid.baseline, entry.task, entry.budget)]
            if kind not in counts:
                counts[kind] = ParameterCount(baseline)
            known[key] = asdict(match_parameters(entry.method, recipe, entry.budget, baseline, counts[kind]))
            write_file(file, json.dumps(known, indent=2) + "\n")
        found[entry] = Matched(**known[key])
    return found
