"""`pedyra paper run`: the comparisons of a table or figure, and its numbers beside the published ones."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pedyra.app.console import write_json_lines
from pedyra.lab.compare import table_formats
from pedyra.lab.compare.compare import compare_grid
from pedyra.lab.paper.grids import Measurement, measurements, row_name
from pedyra.lab.paper.item import Item, Scale
from pedyra.lab.paper.measures import MEASURES, measure
from pedyra.lab.paper.places import Places, told
from pedyra.lab.paper.results import Result, remarks, result_tables, results
from pedyra.lora.files import read_json, write_file


@dataclass(frozen=True)
class Outcome:
    """What a run of an item came to."""

    results: list[Result]
    folder: Path
    """Of the tables and figures."""
    files: list[Path]
    failed: list[str]
    """Runs that failed, and why."""
    missing: int
    """Reported runs that are not there."""


def run_item(
    item: Item,
    scale: Scale,
    *,
    out: Path,
    places: Places | None = None,
    workers: int = 1,
    ray: str | None = None,
    allow_code_execution: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Run what is missing of an item's comparisons and write its table, and its figure, into `out/<scale>/<id>`.

    Finished runs are kept, for every item of the scale that shares them; interrupted ones go on.

    Args:
        places: where models and data are; None: where the recipes say.
        workers, ray: as for `compare_grid`.
        allow_code_execution: run the programs that a model wrote, for HumanEval and MBPP.

    Raises:
        ValueError: a model or data set that is missing, or code to be run without leave; told before anything runs.
        KeyboardInterrupt: Ctrl-C; running jobs have saved a checkpoint.
    """
    places = places or Places()
    check(item, scale, places, allow_code_execution=allow_code_execution)
    planned = measurements(item, scale, out, places)
    values: dict[tuple[str, str], dict[int, float]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    missing = 0
    for each in planned:
        comparison = compare_grid(each.grid, workers=workers, ray=ray, extend=True, console=console)
        failed += [f"{outcome.job.label}: {outcome.message}" for outcome in comparison.failed]
        missing += comparison.missing
        found = [
            with_generated(row, each, allow_code_execution=allow_code_execution, console=console)
            for row in comparison.rows()
        ]
        for cell in each.cells:
            mine = [row for row in found if row["method"] == row_name(cell.part)]
            rows.setdefault(cell.row, mine)
            measured = {row["seed"]: measure(row, cell.metric) for row in mine}
            kept = {seed: value * cell.factor for seed, value in measured.items() if value is not None}
            if kept:
                values[cell.row, cell.column] = kept
    done = results(item, scale, values)
    folder = out / scale / item.id
    files = write_item(item, scale, done, rows, folder)
    return Outcome(done, folder, files, failed, missing)


def check(item: Item, scale: Scale, places: Places, *, allow_code_execution: bool) -> None:
    """Refuse what cannot be done, before anything is done."""
    missing = places.missing(item, scale)
    if missing:
        raise ValueError(f"{item.id} at scale {scale} needs what is not here: {'; '.join(told(missing))}")
    runs_code = {cell.metric for cell in item.cells(scale)} & CODE
    if runs_code and not allow_code_execution:
        raise ValueError(
            f"{item.id} at scale {scale} runs programs that a model wrote ({', '.join(sorted(runs_code))}); "
            f"--allow-code-execution does so, in a sandbox"
        )


CODE = {"humaneval", "humanevalplus", "mbpp", "mbppplus"}
"""Metrics that are found by running what a model wrote."""


def write_item(
    item: Item, scale: Scale, found: list[Result], rows: Mapping[str, list[dict[str, Any]]], folder: Path
) -> list[Path]:
    """The table as Markdown, CSV, LaTeX, HTML and JSON lines, and the figure as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, told = result_tables(item, scale, found), remarks(item, scale, found)
    files = []
    for suffix in ("md", "tex", "html"):
        write = {"md": table_formats.markdown, "tex": table_formats.latex, "html": table_formats.html}[suffix]
        files.append(folder / f"{item.id}.{suffix}")
        write_file(files[-1], write(item.title, tables, told))
    lines = [result.as_row() for result in found]
    text = io.StringIO()
    columns = [name for name in lines[0] if name != "values"]  # of each seed, in the JSON lines alone
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_file(folder / f"{item.id}.csv", text.getvalue())
    write_json_lines(folder / f"{item.id}.jsonl", lines)
    files += [folder / f"{item.id}.csv", folder / f"{item.id}.jsonl"]
    if item.is_figure:
        from pedyra.lab.paper.figures import save_figure

        first = {row: Path(own[0]["run"]) for row, own in rows.items() if own}
        files += save_figure(item, found, first, folder)
    return files


def with_generated(
    row: dict[str, Any], each: Measurement, *, allow_code_execution: bool, console: Console | None
) -> dict[str, Any]:
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

    sets = wanted & set(each.recipe.generate) or None  # a set of its own has metrics of other names
    found = evaluate_run(Path(row["run"]), console=console, allow_code_execution=allow_code_execution, test_sets=sets)
    write_file(file, json.dumps({**kept, **found}, indent=2) + "\n")
    return {**row, "metrics": {**row["metrics"], **found}}
