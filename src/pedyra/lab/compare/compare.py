"""`pedyra compare`: a grid becomes jobs, the jobs become results, the results become tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pedyra.errors import UserError
from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import HERE, Engine, Job, JobEnd, run_jobs
from pedyra.lab.compare.prepare import Experiment, prepare_experiment
from pedyra.lab.compare.results import Comparison, RateCurve, collect
from pedyra.lab.compare.tables import comparison_tables, print_tables, write_tables
from pedyra.lora.files import json_line, write_file

REPORTED, TUNING = "comparison.jsonl", "tuning.jsonl"
"""Files of the rows of this grid's runs alone; runs of an earlier, wider call have theirs in their folders."""


def open_experiment(grid: Grid) -> Experiment:
    """Check a comparison and split its data into its folder. Raises ValueError: a mistake in the grid, or a folder with
    other files or with runs of another grid."""
    folder = Path(grid.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "grid.yaml").is_file():
        raise UserError(f"{folder} holds no comparison (it has no grid.yaml); choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return prepare_experiment(grid, folder)


def compare_experiment(experiment: Experiment, engine: Engine = HERE, console: Console | None = None) -> Comparison:
    """Run the missing runs of a comparison, and write its tables into its folder. Finished runs are kept, interrupted
    ones resume from their checkpoint, failed ones are tried again. After Ctrl-C it raises KeyboardInterrupt."""
    console, grid = console or Console(quiet=True), experiment.grid
    tuning = {entry: jobs for entry in experiment.entries if (jobs := experiment.tuning_jobs(entry))}
    num_reported = len(experiment.entries) * len(grid.seeds)
    console.print(f"{grid.name}: {len(experiment.entries)} rows x tasks x budgets")
    console.print(f"runs        {sum(map(len, tuning.values()))} to choose rates, {num_reported} reported")
    ranks = {(each.method, each.budget, r) for each, r in experiment.lora_ranks.items() if r != each.budget}
    for method, budget, r in sorted(ranks):
        console.print(f"matched     {method}, r = {budget}: lora.r = {r}", soft_wrap=True, markup=False)
    failed = _run_missing([job for jobs in tuning.values() for job in jobs], engine, console)
    curves = [RateCurve(entry, grid.rates(entry.method), collect(jobs, grid.judge)) for entry, jobs in tuning.items()]
    rate_by_entry = {curve.entry: curve.best_rate for curve in curves}
    jobs = [job for entry in experiment.entries for job in experiment.reported_jobs(entry, rate_by_entry)]
    failed += _run_missing(jobs, engine, console)
    rows = collect(jobs, grid.judge)
    comparison = Comparison(grid, rows, curves, failed, num_reported - len(rows))
    tables, remarks = comparison_tables(comparison), comparison.remarks()
    print_tables(console, tables)
    for remark in remarks:
        console.print(f"- {remark}", soft_wrap=True)
    folder = Path(grid.output_dir)
    console.print(f"written     {write_tables(folder / 'comparison', grid.name, tables, remarks)}", soft_wrap=True)
    tuning_rows = [{**row, "chosen": row["learning_rate"] == curve.best_rate} for curve in curves for row in curve.rows]
    for name, each in ((REPORTED, rows), (TUNING, tuning_rows)):
        # The runs' paths are relative to the folder, so that it can be moved.
        relative_rows = ({**row, "run": str(Path(row["run"]).relative_to(folder))} for row in each)
        write_file(folder / name, "".join(map(json_line, relative_rows)))
    return comparison


def _run_missing(jobs: Sequence[Job], engine: Engine, console: Console) -> list[JobEnd]:
    """Run the jobs that are not done, print a line for each, and return those that failed."""
    pending = [job for job in jobs if job.final is None]
    ends: list[JobEnd] = []

    def report(end: JobEnd) -> None:
        ends.append(end)
        outcome, final = end.message or end.status, end.job.final
        if end.status != "failed" and final is not None:
            finite = all(final[key] is not None and math.isfinite(final[key]) for key in ("eval_loss", "value"))
            outcome = f"{final['metric']} {final['value']:.4f}" if finite else "diverged"
        console.print(f"[{len(ends)}/{len(pending)}] {end.job.label}: {outcome}", soft_wrap=True, markup=False)

    run_jobs(pending, report, engine)
    return [end for end in ends if end.status == "failed"]
