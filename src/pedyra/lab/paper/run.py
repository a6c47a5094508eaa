"""`pedyra paper run`: the comparisons of a table or figure, and its numbers beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pedyra.lab.compare.compare import compare_grid
from pedyra.lab.compare.machines import Machines
from pedyra.lab.compare.tables import write_rows, write_tables
from pedyra.lab.paper.grids import Measurement, measurements, row_name
from pedyra.lab.paper.item import Item, Scale
from pedyra.lab.paper.measures import MEASURES, measure
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.results import Result, remarks, result_tables, results
from pedyra.lora.files import read_json, write_file


@dataclass(frozen=True)
class Means:
    """What items are measured with."""

    out: Path
    """Folder of runs, which all items of a scale share, and of tables."""
    places: Places = field(default_factory=Places)
    """Where models and data are; default: where the recipes say."""
    machines: Machines = field(default_factory=Machines)
    allow_code_execution: bool = False
    """Run the programs that a model wrote, for HumanEval and MBPP."""
    console: Console | None = None


@dataclass(frozen=True)
class Measured:
    """What a run of an item came to."""

    item: Item
    """As the scale shows it."""
    results: list[Result]
    folder: Path
    """Of the tables and figures."""
    files: list[Path]
    failed: list[str]
    """Runs that failed, and why."""
    missing: int
    """Reported runs that are not there."""


def run_item(item: Item, scale: Scale, means: Means) -> Measured:
    """Run what is missing of an item's comparisons and write its table, and its figure, into `out/<scale>/<id>`.

    Finished runs are kept, for every item of the scale that shares them; interrupted ones go on.

    Raises:
        ValueError: as `Places.check`, before anything runs.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    means.places.check(item, scale, allow_code_execution=means.allow_code_execution)
    item = item.at(scale)
    values: dict[tuple[str, str], dict[int, float]] = {}
    runs: dict[str, Path] = {}
    failed: list[str] = []
    missing = 0
    for each in measurements(item, scale, means.out, means.places):
        comparison = compare_grid(each.grid, means.machines, extend=True, console=means.console)
        failed += [f"{outcome.job.label}: {outcome.message}" for outcome in comparison.failed]
        missing += comparison.missing
        found = [with_generated(row, each, means) for row in comparison.rows()]
        for cell in each.cells:
            mine = [row for row in found if row["method"] == row_name(cell.part)]
            if mine:
                runs.setdefault(cell.row, Path(mine[0]["run"]))
            measured = {row["seed"]: measure(row, cell.metric) for row in mine}
            kept = {seed: value * cell.factor for seed, value in measured.items() if value is not None}
            if kept:
                values[cell.row, cell.column] = kept
    done = results(item, scale, values)
    folder = means.out / scale / item.id
    return Measured(item, done, folder, write_item(item, scale, done, runs, folder), failed, missing)


def write_item(item: Item, scale: Scale, found: Sequence[Result], runs: Mapping[str, Path], folder: Path) -> list[Path]:
    """The table as Markdown, LaTeX, CSV and JSON lines, and the figure as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, lines = folder / item.id, [result.as_row() for result in found]
    files = write_tables(stem, item.title, result_tables(item, scale, found), remarks(item, scale, found))
    files += write_rows(stem, lines)
    if item.is_figure:
        from pedyra.lab.paper.figures import save_figure

        files += save_figure(item, found, runs, folder)
    return files


def with_generated(row: dict[str, Any], each: Measurement, means: Means) -> dict[str, Any]:
    """The row with the metrics of what the model wrote, where the recipe has it write; kept in the run folder.

    Only the test sets that the cells name are answered, and those that were answered before are not again.
    """
    file = Path(row["run"]) / "evaluation.json"
    kept = read_json(file, {str: (float, None)}) if file.is_file() else {}
    row = {**row, "metrics": {**row["metrics"], **kept}}
    wanted = {cell.metric for cell in each.cells} - {*row["metrics"], *row, *MEASURES}
    if not each.recipe.generate or not wanted:
        return row
    from pedyra.app.runs.evaluate import evaluate_run

    found = evaluate_run(
        Path(row["run"]),
        console=means.console,
        allow_code_execution=means.allow_code_execution,
        test_sets=wanted & set(each.recipe.generate) or None,  # a set of its own has metrics of other names
    )
    write_file(file, json.dumps({**kept, **found}, indent=2) + "\n")
    return {**row, "metrics": {**row["metrics"], **found}}
