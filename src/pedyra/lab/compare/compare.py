"""`pedyra compare`: a grid becomes jobs, the jobs become results, the results become tables."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.app.yaml_file import first_difference
from pedyra.lab.compare.experiment import Experiment, prepare_experiment
from pedyra.lab.compare.grid import Grid, load_grid, only_grows
from pedyra.lab.compare.jobs import Job, Outcome, Purpose, RunJobs, final_row, is_done
from pedyra.lab.compare.machines import Machines
from pedyra.lab.compare.results import Comparison, RateCurve, collect, remarks
from pedyra.lab.compare.tables import comparison_tables, csv_rows, print_tables, write_rows, write_tables
from pedyra.lora.files import read_json, write_file


def compare_grid(
    grid: Grid,
    machines: Machines | None = None,
    *,
    collect: Sequence[Path] = (),
    extend: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Run what is missing of a comparison, or collect it from folders, and write its tables into its folder.

    Finished runs are kept, interrupted ones go on from their checkpoint, failed ones are tried again.

    Args:
        machines: what runs the jobs; default: this one, one at a time.
        collect: folders to put together, beside the comparison's own, instead of running anything.
        extend: accept a folder whose grid has fewer methods, tasks, seeds, budgets or learning rates.
        console: where progress and tables are shown; None: nowhere.

    Raises:
        ValueError: a mistake in the grid or an option, told before anything runs.
        ImportError: Ray is not installed.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    console, machines = console or Console(quiet=True), machines or Machines()
    folder = Path(grid.output_dir)
    if collect:
        own = [folder] if _holds_runs(folder) else []
        comparison = collect_comparison(grid, [*own, *collect])
    else:
        with machines.runner() as run_jobs:
            comparison = _run(grid, run_jobs, console, machines.part, extend=extend)
    print_tables(console, comparison_tables(comparison))
    for remark in remarks(comparison):
        console.print(f"- {remark}", soft_wrap=True)
    for file in write_comparison(comparison, folder):
        console.print(f"written     {file}", soft_wrap=True)
    return comparison


def _run(grid: Grid, run_jobs: RunJobs, console: Console, part: slice, *, extend: bool) -> Comparison:
    """Tuning runs first, then the reported ones at the rates that these chose."""
    folder = open_folder(grid, extend=extend)
    experiment = prepare_experiment(grid, folder)
    entries = experiment.entries[part]
    progress = Progress(console)
    tuning = [job for entry in entries for job in experiment.tuning_jobs(entry)]
    _print_jobs(console, experiment, len(entries), len(tuning))
    progress.run(run_jobs, tuning)
    curves = experiment.curves([folder])
    progress.run(run_jobs, [job for entry in entries for job in experiment.reported_jobs(entry, curves)])
    return summarise(experiment, [folder], progress.failed)


class Progress:
    """Tells how each job ends, in a line, and keeps those that failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failed: list[Outcome] = []

    def run(self, run_jobs: RunJobs, jobs: Sequence[Job]) -> None:
        """Run the jobs that are not done."""
        self.jobs = [job for job in jobs if not is_done(job)]
        self.ended = 0
        if self.jobs:
            run_jobs(self.jobs, self.report)

    def report(self, outcome: Outcome) -> None:
        """Take in how a job ended."""
        self.ended += 1
        told, final = outcome.message or outcome.status, final_row(outcome.job.run)
        if outcome.status == "failed":
            self.failed.append(outcome)
        elif final is not None:
            finite = all(final[key] is not None and math.isfinite(final[key]) for key in ("eval_loss", "value"))
            told = f"{final['metric']} {final['value']:.4f}" if finite else "diverged"
        self.console.print(f"[{self.ended}/{len(self.jobs)}] {outcome.job.label}: {told}", soft_wrap=True, markup=False)


def _print_jobs(console: Console, experiment: Experiment, entries: int, tuning: int) -> None:
    """How many runs there are, and what matching changed."""
    grid = experiment.grid
    where = "" if entries == len(experiment.entries) else f" (of {len(experiment.entries)}; this is one shard)"
    console.print(f"{grid.name}, grid {grid.fingerprint()}: {entries} rows x tasks x budgets{where}", soft_wrap=True)
    console.print(f"runs        {tuning} to choose rates, {entries * len(grid.seeds)} reported", soft_wrap=True)
    told = set()
    for entry, matched in experiment.matched.items():
        changes = {"r": matched.r} if matched.r != entry.budget else {}
        changes |= {f"method_settings.{key}": value for key, value in matched.method_settings.items()}
        if changes:
            listed = ", ".join(f"{key} = {value}" for key, value in changes.items())
            told.add(f"matched     {entry.method}, r = {entry.budget}: {listed}")
    for line in sorted(told):
        console.print(line, soft_wrap=True, markup=False)


def collect_comparison(grid: Grid, folders: Sequence[Path]) -> Comparison:
    """Put together what several folders of the same comparison hold, e.g. from several machines. Runs nothing.

    Raises:
        ValueError: one of them is no folder of this comparison, or had other rows.
    """
    digests: dict[str, tuple[str, Path]] = {}
    for folder in folders:
        if not (folder / "grid.yaml").is_file():
            raise ValueError(f"--collect {folder}: it holds no comparison (no grid.yaml); give the output_dir of one")
        _check_same(grid, folder, extend=False)
        for file in sorted(folder.glob("data/*/splits.json")):
            digest = read_json(file, {"digest": str})["digest"]
            known, where = digests.setdefault(file.parent.name, (digest, folder))
            if known != digest:
                raise ValueError(
                    f"task {file.parent.name} has other rows in {folder} than in {where}; use the same data"
                )
    Path(grid.output_dir).mkdir(parents=True, exist_ok=True)
    return summarise(Experiment.without_data(grid), folders, [])


def summarise(experiment: Experiment, folders: Sequence[Path], failed: Sequence[Outcome]) -> Comparison:
    """The results that are there, at the rates that tuning chose."""
    curves = experiment.curves(folders)
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, curves)]
    results = collect(jobs, folders, experiment.grid.judge)
    missing = len(experiment.entries) * len(experiment.grid.seeds) - len(results)
    return Comparison(experiment.grid, results, list(curves.values()), failed, missing)


def open_folder(grid: Grid, *, extend: bool) -> Path:
    """The comparison's folder, with its grid written down. Raises ValueError if it is not this comparison's."""
    folder = Path(grid.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        if _holds_runs(folder) or not (folder / "grid.yaml").is_file():
            _check_same(grid, folder, extend=extend)
        elif first_difference(load_grid(folder / "grid.yaml").identity(), grid.identity()) is not None:
            # An attempt that was refused before its first run: its splits are not for this grid.
            shutil.rmtree(folder / "data", ignore_errors=True)
            (folder / "matching.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "grid.yaml", grid.to_yaml())
    return folder


def _holds_runs(folder: Path) -> bool:
    return any((folder / purpose).is_dir() for purpose in get_args(Purpose))


def _check_same(grid: Grid, folder: Path, *, extend: bool) -> None:
    file = folder / "grid.yaml"
    if not file.is_file():
        raise ValueError(f"{folder} holds no comparison (it has no grid.yaml); choose another output_dir")
    before = load_grid(file)
    difference = first_difference(before.identity(), grid.identity())
    if difference is None or (extend and only_grows(before, grid)):
        return
    grows = only_grows(before, grid)
    repair = (
        "add --extend to keep its runs and add the new ones" if grows and not extend else "choose another output_dir"
    )
    raise ValueError(f"{folder} holds the results of another grid: {difference}; {repair}")


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md, .tex, .csv, .jsonl, and tuning.jsonl with the whole learning-rate curves."""
    stem = folder / "comparison"
    files = write_tables(stem, comparison.grid.name, comparison_tables(comparison), remarks(comparison))
    write_json_lines(folder / "tuning.jsonl", _curve_rows(comparison.curves))
    return [*files, *write_rows(stem, comparison.rows(), csv_rows(comparison))]


def _curve_rows(curves: Iterable[RateCurve]) -> Iterable[dict[str, Any]]:
    for curve in curves:
        for point in curve.points:
            for seed, value in point.values.items():
                yield {
                    **{"method": curve.entry.method, "task": curve.entry.task, "budget": curve.entry.budget},
                    **{"learning_rate": point.rate, "seed": seed, "metric": curve.metric, "value": value},
                    "chosen": point.rate == curve.chosen,
                }
