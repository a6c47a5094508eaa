"""`pedyra compare`: a grid becomes jobs, the jobs become results, the results become tables."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.app.yaml_file import first_difference
from pedyra.lab.compare import table_formats
from pedyra.lab.compare.comparison import Comparison, csv_rows, remarks
from pedyra.lab.compare.experiment import Experiment, prepare_experiment
from pedyra.lab.compare.grid import Grid, load_grid, only_grows
from pedyra.lab.compare.jobs import Job, Outcome, Purpose, is_done
from pedyra.lab.compare.pool import LocalPool, Pool
from pedyra.lab.compare.process import Forked, can_fork, start_anew
from pedyra.lab.compare.results import RateCurve, collect
from pedyra.lab.compare.screen import LiveTable, print_comparison, print_jobs
from pedyra.lab.compare.tables import comparison_tables
from pedyra.lora.files import read_json, write_file


def compare_grid(
    grid: Grid,
    *,
    workers: int = 1,
    ray: str | None = None,
    shard: str = "1/1",
    collect: Sequence[Path] = (),
    extend: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Run what is missing of a comparison, or collect it from folders, and write its tables into its folder.

    Finished runs are kept, interrupted ones go on from their checkpoint, failed ones are tried again.

    Args:
        workers: local processes at once; without `ray`. A script that calls this has `if __name__ == "__main__":`.
        ray: address of a Ray cluster to run on.
        shard: "i/n": only the i-th of n parts of the grid, for one of several machines.
        collect: folders to put together, beside the comparison's own, instead of running anything.
        extend: accept a folder whose grid has fewer methods, tasks, seeds, budgets or learning rates.
        console: where progress and tables are shown; None: nowhere.

    Raises:
        ValueError: a mistake in the grid or an option, told before anything runs.
        ImportError: Ray is not installed.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    part = _slice_of(shard)
    console = console or Console(quiet=True)
    folder = Path(grid.output_dir)
    if collect:
        own = [folder] if _holds_runs(folder) else []
        comparison = collect_comparison(grid, [*own, *collect])
    elif ray is not None:
        from pedyra.lab.compare.ray_pool import RayPool

        with closing(RayPool(ray)) as pool:
            comparison = _run(grid, pool, console, part, extend=extend)
    else:
        pool = LocalPool(workers, Forked if can_fork() else start_anew)
        comparison = _run(grid, pool, console, part, extend=extend)
    print_comparison(console, comparison_tables(comparison), remarks(comparison))
    for file in write_comparison(comparison, folder):
        console.print(f"written     {file}", soft_wrap=True)
    return comparison


def _slice_of(shard: str) -> slice:
    """ "2/3" -> every third entry from the second on. Raises ValueError."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--shard is {shard!r}; it is i/n with 1 <= i <= n, e.g. 2/3")
    return slice(int(index) - 1, None, int(count))


def _run(grid: Grid, pool: Pool, console: Console, part: slice, *, extend: bool) -> Comparison:
    """Tuning runs first, then the reported ones at the rates that these chose."""
    folder = open_folder(grid, extend=extend)
    failed: list[Outcome] = []

    def run(title: str, jobs: Sequence[Job]) -> None:
        with LiveTable(console, title, jobs) as live:
            try:
                pool.run([job for job in jobs if not is_done(job)], live.report)
            finally:
                failed.extend(live.failed)

    experiment = prepare_experiment(grid, folder, lambda jobs: run("timing", jobs))
    entries = experiment.entries[part]
    tuning = [job for entry in entries for job in experiment.tuning_jobs(entry)]
    print_jobs(console, experiment, len(entries), len(tuning))
    if tuning:
        run("tuning", tuning)
    curves = experiment.curves([folder])
    run("runs", [job for entry in entries for job in experiment.reported_jobs(entry, curves)])
    return summarise(experiment, [folder], failed)


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
    """comparison.md, .csv, .tex, .html, .jsonl, and tuning.jsonl with the whole learning-rate curves."""
    title, found, told = comparison.grid.name, comparison_tables(comparison), remarks(comparison)
    for suffix, write in (("md", table_formats.markdown), ("tex", table_formats.latex), ("html", table_formats.html)):
        write_file(folder / f"comparison.{suffix}", write(title, found, told))
    write_file(folder / "comparison.csv", _csv(csv_rows(comparison)))
    write_json_lines(folder / "comparison.jsonl", comparison.rows())
    write_json_lines(folder / "tuning.jsonl", _curve_rows(comparison.curves))
    return [folder / f"comparison.{suffix}" for suffix in ("md", "csv", "tex", "html", "jsonl")]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _curve_rows(curves: Iterable[RateCurve]) -> Iterable[dict[str, Any]]:
    for curve in curves:
        for point in curve.points:
            for seed, value in point.values.items():
                yield {
                    **{"method": curve.entry.method, "task": curve.entry.task, "budget": curve.entry.budget},
                    **{"learning_rate": point.rate, "seed": seed, "metric": curve.metric, "value": value},
                    "chosen": point.rate == curve.chosen,
                }
