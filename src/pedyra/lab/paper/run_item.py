"""`pedyra paper run`: the comparisons of a table or figure, and its numbers beside the published ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.lab.compare.compare import compare_grid
from pedyra.lab.compare.tables import write_tables
from pedyra.lab.paper.grids import Measurement, measurements, row_name
from pedyra.lab.paper.item import Item, Scale
from pedyra.lab.paper.item_results import Result, remarks, result_tables, results
from pedyra.lab.paper.places import Places
from pedyra.lab.paper.run_measures import MEASURES, measure
from pedyra.lora.files import read_json, write_file


@dataclass(frozen=True)
class Means:
    """What items are measured with."""

    out: Path
    """Folder of runs, which all items of a scale share, and of tables."""
    places: Places = field(default_factory=Places)
    """Where models and data are; default: where the recipes say."""
    workers: int = 1
    allow_code_execution: bool = False
    """Run the programs that a model wrote, for HumanEval and MBPP."""
    console: Console | None = None


@dataclass(frozen=True)
class MeasuredItem:
    """What a run of an item came to."""

    item: Item
    """With the columns that the scale measures."""
    results: list[Result]
    files: list[Path]
    """Tables and figures."""
    failed: list[str]
    """Runs that failed, and why."""


def run_item(item: Item, scale: Scale, means: Means) -> MeasuredItem:
    """Run what is missing of an item's comparisons and write its table, and its figure, into `out/<scale>/<id>`.

    Finished runs are kept, for every item of the scale that shares them; interrupted ones go on.

    Raises:
        ValueError: as `Places.check`, before anything runs.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    means.places.check(item, scale, allow_code_execution=means.allow_code_execution)
    values: dict[tuple[str, str], dict[int, float]] = {}
    runs: dict[str, Path] = {}
    failed: list[str] = []
    for each in measurements(item, scale, means.out, means.places):
        comparison = compare_grid(each.grid, means.workers, means.console)
        failed += [f"{end.job.label}: {end.message}" for end in comparison.failed]
        found = [with_generated(row, each, means) for row in comparison.rows]
        for cell in each.cells:
            mine = [row for row in found if row["method"] == row_name(cell.part)]
            if mine:
                runs.setdefault(cell.row, Path(mine[0]["run"]))
            measured = {row["seed"]: measure(row, cell.metric) for row in mine}
            kept = {seed: value * cell.part.factor for seed, value in measured.items() if value is not None}
            if kept:
                values[cell.row, cell.column] = kept
    item = item.at(scale)
    done, folder = results(item, scale, values), means.out / scale / item.id
    folder.mkdir(parents=True, exist_ok=True)
    tables = result_tables(item, scale, done)
    files = [
        write_tables(folder / item.id, item.title, tables, remarks(item, scale, done)),
        folder / f"{item.id}.jsonl",
    ]
    write_json_lines(files[-1], [result.as_row() for result in done])
    if item.is_figure:
        from pedyra.lab.paper.item_figures import save_figure

        files += save_figure(item, done, runs, folder)
    return MeasuredItem(item, done, files, failed)


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
