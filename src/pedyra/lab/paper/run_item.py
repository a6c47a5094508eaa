"""`pedyra paper run`: the comparisons that measure a table or figure, one grid for each recipe and rank, shared by all
items of a scale; and its numbers beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import OutOfMemoryError

from pedyra.app.known_sets import TEST_SETS
from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import GENERATED
from pedyra.lab.compare.compare import compare_experiment, open_experiment
from pedyra.lab.compare.grid import Grid, check_grid
from pedyra.lab.compare.jobs import HERE, Engine
from pedyra.lab.compare.plan import Plan, plan_experiment
from pedyra.lab.compare.prepare import digests
from pedyra.lab.compare.tables import write_tables
from pedyra.lab.paper.figures import MEASURES, measure, save_figure
from pedyra.lab.paper.item import Cell, CellPart, Item, Scale, get_item
from pedyra.lab.paper.item_results import CellRow, remarks, result_tables, results
from pedyra.lab.paper.places import Places
from pedyra.lora.files import json_line, read_json, write_file
from pedyra.methods.names import setting_names

RATES = (0.1, 0.3, 1.0, 3.0)
"""The rates that each method chooses from on tuning rows, relative to the recipe's, with encoders at scale small.

At scale full there is one rate, because the paper gives one for each task and none for its baselines; language models,
whose runs are long, have one at every scale.
"""

FROM_ZERO = 10.0
"""A factor of the rates at scale small, for a method that starts with no gradient in A and B (measured by
`recipes/compare_short.yaml`). At LoRA's rate PE-DyRA learns nothing in 50 steps of Qwen2.5-Coder-0.5B: perplexity 2.55,
LoRA's 1.74."""

STARTS_FROM_ZERO = (  # but where `lora.init` gives them an update to begin with
    "adalora", "adalora-svd", "increlora", "triadaptlora", "pedyra", "prune", "expand", "random", "mask",
)  # fmt: skip
TUNING_ROWS = 1000
"""The rows of a tuning run's evaluation: a tenth of SST-2 would take longer than the training."""


class MeasuredItem(NamedTuple):
    results: list[CellRow]
    files: list[Path]
    """Tables and figures."""
    failed: list[str]
    """Runs whose training or generation failed, and why."""


def run_item(
    item: Item,
    scale: Scale,
    out: Path,
    places: Places,
    engine: Engine = HERE,
    allow_code_execution: bool = False,
    console: Console | None = None,
) -> MeasuredItem:
    """Run the missing runs of an item's comparisons and write its table, and its figure, into `out/<scale>/<id>`.

    A part of its rows or columns (`Item.only`) goes into the folder `part` there, beside the whole table. Finished runs
    are kept, for every item of the scale that shares them; interrupted ones resume. Raises ValueError, before anything
    runs, for a model or data that does not exist.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    rates: dict[tuple[str, str], float] = {}
    runs: dict[str, Path] = {}
    failed: list[str] = []
    notes: list[str] = []
    grids = measurements(item, scale, out, places)
    experiments = [open_experiment(each.grid) for each in grids]  # all are checked before the first runs
    for each, experiment in zip(grids, experiments, strict=True):
        comparison = compare_experiment(experiment, engine, console)
        failed += [f"{end.job.label}: {end.message}" for end in comparison.failed]
        notes += comparison.remarks()
        rows = []
        for row in comparison.rows:
            try:
                rows.append(with_generated(row, each, allow_code_execution, console))
            except (ValueError, OSError, ImportError, OutOfMemoryError) as error:
                # This run's generation failed; its other metrics, and the other runs, are kept.
                failed.append(f"{row['run']}: {error}")
                rows.append(row)
        for cell in each.cells:
            mine = [row for row in rows if row["method"] == row_name(cell.part)]
            if mine:
                runs.setdefault(cell.row, Path(mine[0]["run"]))
            numbers = {row["seed"]: measure(row, cell.metric) for row in mine}
            published_numbers = {seed: value * cell.part.factor for seed, value in numbers.items() if value is not None}
            if published_numbers:
                values[cell.row, cell.column] = published_numbers
                rates[cell.row, cell.column] = mine[0]["learning_rate"]  # one for all seeds
    whole, folder = get_item(item.id), out / scale / item.id
    if (item.rows.keys(), item.columns.keys()) != (whole.rows.keys(), whole.columns.keys()):
        folder /= "part"
    item = item.at(scale)
    cells = results(item, scale, values, rates)
    folder.mkdir(parents=True, exist_ok=True)
    tables = result_tables(item, scale, cells)
    files = [
        write_tables(folder / item.id, item.title, tables, [*remarks(item, scale, cells), *notes]),
        folder / f"{item.id}.jsonl",
    ]
    write_file(files[-1], "".join(map(json_line, cells)))
    if item.is_figure:
        files += save_figure(item, cells, runs, folder)
    return MeasuredItem(cells, files, failed)


def plan_item(item: Item, scale: Scale, out: Path, places: Places) -> Plan:
    """Check the comparisons of an item, and count the runs that are left. Raises ValueError as `run_item` does."""
    experiments = (open_experiment(each.grid) for each in measurements(item, scale, out, places))
    return sum(map(plan_experiment, experiments), Plan(0, 0, 0.0, 0.0))


def with_generated(
    row: dict[str, Any], each: Measurement, allow_code_execution: bool, console: Console | None = None
) -> dict[str, Any]:
    """Return the row with the metrics of the test sets that the cells name; they are saved in the run folder.

    A test set is answered once, unless its settings or files have changed.
    """
    file = Path(row["run"]) / "evaluation.json"
    request = {
        "generate": each.recipe.model_dump(mode="json")["generate"],
        "files": digests(*(test_set.source for test_set in each.recipe.generate.values())),
    }
    before = read_json(file, {"generate": dict, "metrics": dict}) if file.is_file() else {}
    earlier = before["metrics"] if {key: before.get(key) for key in request} == request else {}
    row = {**row, "metrics": {**row["metrics"], **earlier}}
    metrics = {cell.metric for cell in each.cells} - {*row["metrics"], *row, *MEASURES}
    if not each.recipe.generate or not metrics:
        return row
    from pedyra.app.runs.evaluate import evaluate_run

    result = evaluate_run(
        Path(row["run"]),
        console=console,
        allow_code_execution=allow_code_execution,
        generate=_named(each.recipe.generate, metrics),
    )
    write_file(file, json.dumps({**request, "metrics": {**earlier, **result}}, indent=2) + "\n")
    return {**row, "metrics": {**row["metrics"], **result}}


def _named(generate: Mapping[str, Any], metrics: Set[str]) -> Mapping[str, Any]:
    """Select the test sets of these metrics, and the recipe's own, whose metrics have other names."""
    return {name: of for name, of in generate.items() if name in metrics or name not in TEST_SETS}


@dataclass(frozen=True)
class Measurement:
    """A grid, and the cells of the item that its rows measure."""

    grid: Grid
    recipe: Recipe
    cells: list[Cell]


def measurements(item: Item, scale: Scale, out: Path, places: Places) -> list[Measurement]:
    """Return the grids of an item, in folders below `out` that other items of the scale share."""
    groups: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in item.cells(scale):
        groups.setdefault((cell.recipe, cell.part.r), []).append(cell)
    result = []
    for (name, r), cells in groups.items():
        recipe = places.resolve(name)
        cells = [_without_the_recipes_own(cell, recipe) for cell in cells]
        r = r or recipe.lora.r
        folder = out / scale / "runs" / f"{name}_r{r}"
        content = grid_content(recipe, [cell.part for cell in cells], scale, r, folder)
        content["seeds"] = item.scales[scale].seeds
        # A run checks its test sets before it trains, so that it gets only those that are measured.
        content["generate"] = dict(_named(content["generate"], {cell.metric for cell in cells}))
        result.append(Measurement(check_grid(content, item.id), recipe, cells))
    return result


def _without_the_recipes_own(cell: Cell, recipe: Recipe) -> Cell:
    """Drop the settings that the recipe's method has too, so that one run serves both."""
    own = recipe.method.settings
    settings = {key: value for key, value in cell.part.settings.items() if own.get(key) != value}
    return replace(cell, part=cell.part.model_copy(update={"settings": settings}))


def grid_content(recipe: Recipe, parts: Sequence[CellPart], scale: Scale, r: int, folder: Path) -> dict[str, Any]:
    """Return the grid with these rows, but for its seeds."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    training = dict(content["training"])
    rate = training.pop("learning_rate")
    alpha = recipe.lora.alpha * r / recipe.lora.r  # the scaling alpha / r is the recipe's at every rank
    factors = RATES if scale == "small" and recipe.data.kind not in GENERATED else (1.0,)
    rates = [rate * factor for factor in factors]
    names = {name for part in parts for name in setting_names(str(part.method))}
    return {
        "name": folder.name,
        "output_dir": str(folder),
        "model": content["model"],
        "lora": {**content.get("lora", {}), "r": r, "alpha": alpha},
        "shared": {key: value for key, value in recipe.method.settings.items() if key in names},
        "training": training,
        "methods": {row_name(part): _row(part, rates, scale) for part in parts},
        "tasks": {recipe.name: content["data"]},
        "learning_rates": rates,
        **({"tuning": {"rows": TUNING_ROWS}} if len(rates) > 1 else {}),
        "match": "rank",  # as the paper compares
        "generate": content.get("generate", {}),
    }


def row_name(part: CellPart) -> str:
    """Name a method with its settings in a grid: equal settings have one name, which can be a folder's."""
    settings = {**part.lora, **part.settings, **({"quantization": part.quantization} if part.quantization else {})}
    return "_".join([str(part.method), *(f"{key}={settings[key]}" for key in sorted(settings))])


def _row(part: CellPart, rates: list[float], scale: Scale) -> dict[str, Any]:
    row = {key: value for key in ("match", "quantization", "lora") if (value := getattr(part, key))}
    row["method"] = {"name": part.method, **part.settings}
    if scale == "small" and part.method in STARTS_FROM_ZERO and "init" not in part.lora:
        row["learning_rates"] = [float(f"{rate * FROM_ZERO:g}") for rate in rates]  # not 0.0029999999999999996
    return row
