"""`pedyra compare`: a grid becomes jobs, the jobs become results, the results become tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.app.recipe import Recipe, check_recipe
from pedyra.app.recipe_sections import LoraSection
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.setup import resolve
from pedyra.app.yaml_file import first_difference, read_settings
from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import Entry, Job, JobEnd, Purpose, final_row, is_done, run_jobs
from pedyra.lab.compare.matching import Matched, ParameterCount, match_parameters
from pedyra.lab.compare.named_tasks import task_data
from pedyra.lab.compare.results import Comparison, RateCurve, collect
from pedyra.lab.compare.splits import TaskSplits, split_task
from pedyra.lab.compare.tables import comparison_tables, print_tables, write_tables
from pedyra.lora.files import write_file
from pedyra.methods.method import SCHEDULE
from pedyra.methods.wide import Wide
from pedyra.pe_dyra.scored import PeDyra


def compare_grid(grid: Grid, workers: int = 1, console: Console | None = None) -> Comparison:
    """Run what is missing of a comparison, and write its tables into its folder.

    Finished runs are kept, interrupted ones go on from their checkpoint, failed ones are tried again.

    Args:
        workers: runs at once.
        console: where progress and tables are shown; None: nowhere.

    Raises:
        ValueError: a mistake in the grid, told before anything runs, or a folder with runs of another grid.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    console = console or Console(quiet=True)
    folder = Path(grid.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "grid.yaml").is_file():
        raise ValueError(f"{folder} holds no comparison (it has no grid.yaml); choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    experiment = prepare_experiment(grid, folder)
    tuning = {entry: jobs for entry in experiment.entries if (jobs := experiment.tuning_jobs(entry))}
    reported = len(experiment.entries) * len(grid.seeds)
    console.print(f"{grid.name}: {len(experiment.entries)} rows x tasks x budgets")
    console.print(f"runs        {sum(map(len, tuning.values()))} to choose rates, {reported} reported")
    for line in sorted({_changes(entry, matched) for entry, matched in experiment.matched.items()} - {""}):
        console.print(f"matched     {line}", soft_wrap=True, markup=False)
    failed = _run_missing([job for jobs in tuning.values() for job in jobs], workers, console)
    curves = [RateCurve(entry, grid.rates(entry.method), collect(jobs, grid.judge)) for entry, jobs in tuning.items()]
    chosen = {curve.entry: curve.chosen for curve in curves}
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, chosen)]
    failed += _run_missing(jobs, workers, console)
    rows = collect(jobs, grid.judge)
    comparison = Comparison(grid, rows, curves, failed, reported - len(rows))
    _show(comparison, folder, console)
    return comparison


def _show(comparison: Comparison, folder: Path, console: Console) -> None:
    """Print the tables, and write them and the rows into the folder."""
    tables, remarks, stem = comparison_tables(comparison), comparison.remarks(), folder / "comparison"
    print_tables(console, tables)
    for remark in remarks:
        console.print(f"- {remark}", soft_wrap=True)
    tuned = [{**row, "chosen": row["learning_rate"] == c.chosen} for c in comparison.curves for row in c.rows]
    write_json_lines(folder / "tuning.jsonl", tuned)
    write_json_lines(stem.with_suffix(".jsonl"), comparison.rows)
    console.print(f"written     {write_tables(stem, comparison.grid.name, tables, remarks)}", soft_wrap=True)


def _changes(entry: Entry, matched: Matched) -> str:
    """What matching changed of an entry; "" where it changed nothing."""
    changes = {"lora.r": matched.r} if matched.r != entry.budget else {}
    changes |= {f"method_settings.{key}": value for key, value in matched.method_settings.items()}
    listed = ", ".join(f"{key} = {value}" for key, value in changes.items())
    return f"{entry.method}, r = {entry.budget}: {listed}" if changes else ""


def _run_missing(jobs: Sequence[Job], workers: int, console: Console) -> list[JobEnd]:
    """Run the jobs that are not done, telling how each ends in a line; those that failed."""
    missing = [job for job in jobs if not is_done(job)]
    ends: list[JobEnd] = []

    def report(end: JobEnd) -> None:
        ends.append(end)
        told, final = end.message or end.status, final_row(end.job.run)
        if end.status != "failed" and final is not None:
            finite = all(final[key] is not None and math.isfinite(final[key]) for key in ("eval_loss", "value"))
            told = f"{final['metric']} {final['value']:.4f}" if finite else "diverged"
        console.print(f"[{len(ends)}/{len(missing)}] {end.job.label}: {told}", soft_wrap=True, markup=False)

    run_jobs(missing, report, workers)
    return [end for end in ends if end.status == "failed"]


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

    def tuning_jobs(self, entry: Entry) -> list[Job]:
        """One per rate and tuning seed; none where there is nothing to choose."""
        rates = self.grid.rates(entry.method)
        seeds = self.grid.tuning.seeds if len(rates) > 1 else []
        return [self.job(entry, rate, seed, "tuning") for rate in rates for seed in seeds]

    def reported_jobs(self, entry: Entry, chosen: Mapping[Entry, float | None]) -> list[Job]:
        """One per seed, at the chosen rate, or the only one; none where tuning chose none."""
        rate = chosen.get(entry, self.grid.rates(entry.method)[0])
        return [] if rate is None else [self.job(entry, rate, seed, "jobs") for seed in self.grid.seeds]

    def job(self, entry: Entry, rate: float, seed: int, purpose: Purpose) -> Job:
        """A run. Raises ValueError where its folder holds one of another recipe."""
        job = Job(entry, rate, seed, purpose, self.folder, {})
        name = {"name": entry.task, "output_dir": str(job.run), "seed": seed}
        job.recipe.update(name | self.content(entry, rate, purpose))
        if job.recipe_file.is_file():
            before = read_settings(job.recipe_file, (), what="recipe", starts_with="method")
            difference = first_difference(_identity(before), _identity(job.recipe))
            if difference is not None:
                raise ValueError(f"{job.run} is a run of another grid: {difference}; choose another output_dir")
        return job

    def content(self, entry: Entry, rate: float, purpose: Purpose) -> dict[str, Any]:
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
        if purpose == "jobs" and grid.fit is not None:
            content["fit"] = grid.fit
        return {**content, "generate": grid.generate} if grid.generate else content


def _identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the outcome of a run: neither where its files are, nor what it is asked when it has ended."""
    kept = {key: value for key, value in recipe.items() if key not in ("output_dir", "generate")}
    paths = ("source", "validation")
    return {**kept, "data": {key: value for key, value in recipe["data"].items() if key not in paths}}


def prepare_experiment(grid: Grid, folder: Path) -> Experiment:
    """Split the data, check every row's recipe, and match the rows.

    Raises:
        ValueError: a mistake in a recipe, or a row that cannot be matched within 5 %.
    """
    sections = {label: _data_section(grid, label) for label in grid.tasks}
    write_file(folder / "grid.yaml", grid.to_yaml())
    splits = {
        label: split_task(label, section, grid.tuning.rows, folder / "data" / label)
        for label, section in sections.items()
    }
    bare = Experiment(grid, folder, splits, {})
    recipes = {entry: _row_recipe(bare, entry) for entry in bare.entries}
    return Experiment(grid, folder, splits, _match(grid, recipes))


def _data_section(grid: Grid, label: str) -> Any:
    """The task's section, checked as part of a recipe, which tells a mistake in one line."""
    data = task_data(label, grid.tasks[label], grid.data_dir)
    return check_recipe({"name": label, "model": grid.model, "data": data}, f"tasks.{label}").data


def _row_recipe(experiment: Experiment, entry: Entry) -> Recipe:
    """The recipe of a row, as its method resolves it; ValueError for what can be told from the recipe alone."""
    where = f"methods.{entry.method} on {entry.task}"
    content = experiment.content(entry, experiment.grid.rates(entry.method)[0], "jobs")
    recipe = check_recipe({"name": entry.task, **content}, where)
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


def _match(grid: Grid, recipes: Mapping[Entry, Recipe]) -> dict[Entry, Matched]:
    """What is matched for every entry; tasks of one kind are matched alike, for the head is left out."""
    counts: dict[str, ParameterCount] = {}
    known: dict[tuple[str, str, int], Matched] = {}
    found = {}
    for entry, recipe in recipes.items():
        if grid.match_of(entry.method) == "rank":
            found[entry] = Matched(entry.budget)
            continue
        kind = recipe.data.kind
        key = (entry.method, kind, entry.budget)
        if key not in known:
            baseline = recipes[Entry(grid.baseline, entry.task, entry.budget)]
            if kind not in counts:
                counts[kind] = ParameterCount(baseline)
            known[key] = match_parameters(entry.method, recipe, entry.budget, baseline, counts[kind])
        found[entry] = known[key]
    return found
