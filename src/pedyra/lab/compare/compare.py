"""`pedyra compare`: a grid becomes jobs, the jobs become results, the results become tables."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.app.yaml_file import first_difference
from pedyra.lab.compare.experiment import Experiment, prepare_experiment
from pedyra.lab.compare.grid import Grid, load_grid, only_grows
from pedyra.lab.compare.jobs import Job, Outcome, Purpose, RunJobs, final_row, is_done
from pedyra.lab.compare.machines import Machines
from pedyra.lab.compare.results import Comparison, collect
from pedyra.lab.compare.tables import comparison_tables, print_tables, write_rows, write_tables
from pedyra.lora.files import write_file


def compare_grid(
    grid: Grid, machines: Machines | None = None, *, extend: bool = False, console: Console | None = None
) -> Comparison:
    """Run what is missing of a comparison, and write its tables into its folder.

    Finished runs are kept, interrupted ones go on from their checkpoint, failed ones are tried again.

    Args:
        machines: what runs the jobs; default: this one, one at a time.
        extend: accept a folder whose grid has fewer methods, tasks, seeds, budgets or learning rates.
        console: where progress and tables are shown; None: nowhere.

    Raises:
        ValueError: a mistake in the grid, told before anything runs.
        ImportError: Ray is not installed.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    console = console or Console(quiet=True)
    folder = _open_folder(grid, extend=extend)
    experiment = prepare_experiment(grid, folder)
    with (machines or Machines()).runner() as run_jobs:
        comparison = _run(experiment, run_jobs, console)
    tables, remarks, stem = comparison_tables(comparison), comparison.remarks(), folder / "comparison"
    print_tables(console, tables)
    for remark in remarks:
        console.print(f"- {remark}", soft_wrap=True)
    files = write_tables(stem, grid.name, tables, remarks) + write_rows(stem, comparison.rows())
    write_json_lines(folder / "tuning.jsonl", (row for curve in comparison.curves for row in curve.rows()))
    for file in files:
        console.print(f"written     {file}", soft_wrap=True)
    return comparison


def _run(experiment: Experiment, run_jobs: RunJobs, console: Console) -> Comparison:
    """Tuning runs first, then the reported ones at the rates that these chose."""
    grid, progress = experiment.grid, Progress(console)
    tuning = [job for entry in experiment.entries for job in experiment.tuning_jobs(entry)]
    reported = len(experiment.entries) * len(grid.seeds)
    console.print(f"{grid.name}, grid {grid.fingerprint()}: {len(experiment.entries)} rows x tasks x budgets")
    console.print(f"runs        {len(tuning)} to choose rates, {reported} reported")
    for line in sorted({matched.told(entry.method, entry.budget) for entry, matched in experiment.matched.items()}):
        if line:
            console.print(f"matched     {line}", soft_wrap=True, markup=False)
    progress.run(run_jobs, tuning)
    curves = experiment.curves()
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, curves)]
    progress.run(run_jobs, jobs)
    results = collect(jobs, grid.judge)
    return Comparison(grid, results, list(curves.values()), progress.failed, reported - len(results))


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


def _open_folder(grid: Grid, *, extend: bool) -> Path:
    """The comparison's folder, with its grid written down. Raises ValueError if it is not this comparison's."""
    folder = Path(grid.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        file = folder / "grid.yaml"
        if not file.is_file():
            raise ValueError(f"{folder} holds no comparison (it has no grid.yaml); choose another output_dir")
        before = load_grid(file)
        difference, grows = first_difference(before.identity(), grid.identity()), only_grows(before, grid)
        if difference is not None and not any((folder / purpose).is_dir() for purpose in get_args(Purpose)):
            # An attempt that was refused before its first run: its splits are not for this grid.
            shutil.rmtree(folder / "data", ignore_errors=True)
            (folder / "matching.json").unlink(missing_ok=True)
        elif difference is not None and not (extend and grows):
            keep = "add --extend to keep its runs and add the new ones"
            repair = keep if grows and not extend else "choose another output_dir"
            raise ValueError(f"{folder} holds the results of another grid: {difference}; {repair}")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "grid.yaml", grid.to_yaml())
    return folder
