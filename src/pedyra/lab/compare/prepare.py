"""Before a comparison runs, its data is split, its recipes are checked, and its methods are matched.

The rows of a task are split once and saved, the same for every job:

training rows ──┬── tuning-train ── what a tuning run trains on
                └── tuning ──────── what it is judged on, to choose a learning rate
reported rows ───────────────────── what a reported run is judged on; it trains on all training rows

Methods are matched by the number of trained parameters: each gets the rank at which it has the baseline's.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pedyra.app.models.base import load_tokenizer, shape_of
from pedyra.app.models.lora import check_names
from pedyra.app.recipe import Recipe, check_recipe, identity
from pedyra.app.recipe_sections import METRICS, DataSection, MethodSection
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.setup import begin_method, resolve
from pedyra.app.tasks.sources import check_apart, held_out, load_rows, sample
from pedyra.app.tasks.text import known_labels
from pedyra.app.yaml_file import first_difference, read_settings
from pedyra.errors import UserError
from pedyra.lab.compare.grid import Grid
from pedyra.lab.compare.jobs import Entry, Job, Purpose
from pedyra.lab.compare.named_tasks import task_data
from pedyra.lora.files import digest, read_json, write_file
from pedyra.methods.names import setting_names
from pedyra.methods.registry import get_method

SEED = 0
"""The seed of the splits, which are the same for every method and seed of a run."""
TUNING = 0.1
"""The part of the training rows that judges tuning runs."""
WHICH_ROWS = {"source", "validation", "config", "split", "validation_fraction", "group_by", "eval_rows"}
"""Keys of `data` that the split has used up."""
TOLERANCE = 0.05
"""The largest relative difference to the baseline's number of parameters."""


@dataclass(frozen=True)
class Experiment:
    """A grid whose data is split, and whose rows are matched."""

    grid: Grid
    folder: Path
    splits: Mapping[str, Mapping[str, Any]]
    """Task -> purpose of a job -> its section `data`."""
    lora_ranks: Mapping[Entry, int]
    """The rank at which a row has the baseline's parameters."""
    weights: Mapping[str, int]
    """Kind of data -> the number of parameters of the base model."""

    @property
    def entries(self) -> list[Entry]:
        """Return rows x tasks x budgets."""
        grid = self.grid
        return [
            Entry(method, task, budget) for budget in grid.all_budgets for task in grid.tasks for method in grid.methods
        ]

    def tuning_jobs(self, entry: Entry) -> list[Job]:
        """Return a run per rate and tuning seed; none where there is nothing to choose."""
        rates = self.grid.rates(entry.method)
        seeds = self.grid.tuning.seeds if len(rates) > 1 else []
        return [self.job(entry, rate, seed, "tuning") for rate in rates for seed in seeds]

    def reported_jobs(self, entry: Entry, rate_by_entry: Mapping[Entry, float | None]) -> list[Job]:
        """Return a run per seed, at the chosen rate, or the only one; none where tuning chose none."""
        rate = rate_by_entry.get(entry, self.grid.rates(entry.method)[0])
        return [] if rate is None else [self.job(entry, rate, seed, "jobs") for seed in self.grid.seeds]

    def job(self, entry: Entry, rate: float, seed: int, purpose: Purpose) -> Job:
        """Return a run. Raise ValueError where its folder holds one of another recipe."""
        job = Job(entry, rate, seed, purpose, self.folder, {})
        name = {"name": entry.task, "output_dir": str(job.run), "seed": seed}
        job.recipe.update(name | self.content(entry, rate, purpose))
        if (job.run / "recipe.yaml").is_file() and job.recipe_file.is_file():  # else it has not begun
            before = read_settings(job.recipe_file, (), what="recipe", starts_with="method")
            difference = first_difference(identity(before), identity(job.recipe))
            if difference is not None:
                raise UserError(f"{job.run} is a run of another grid: {difference}; choose another output_dir")
        return job

    def content(self, entry: Entry, rate: float, purpose: Purpose) -> dict[str, Any]:
        """Return a recipe: the grid's sections, the row's own over them, and the matched rank."""
        grid, row = self.grid, self.grid.methods[entry.method]
        r = self.lora_ranks.get(entry, entry.budget)
        lora, alpha, settings = grid.lora_of(entry.method), grid.lora.alpha, grid.settings_of(entry.method)
        if r != grid.lora.r:  # the scaling stays: alpha / r, or alpha / sqrt(r)
            ratio = r / grid.lora.r
            alpha *= math.sqrt(ratio) if lora.get("use_rslora") else ratio
        if "final_rank" not in settings:  # a row that has one begins with the LoRA of the budget
            beginning = get_method(row.method.name).at_budget(r)
            r, alpha, settings = beginning.r, alpha * beginning.alpha, beginning.settings | settings
        if grid.match_of(entry.method) == "parameters" and "budget" in setting_names(row.method.name):
            # A budget of ranks would end with another number of parameters than the matched one.
            settings = {"budget": "parameters", **settings}
        bits = {} if row.quantization is None else {"quantization": row.quantization}
        content = {
            "method": {"name": row.method.name, **settings},
            "model": grid.model | bits,
            "data": dict(self.splits[entry.task][purpose]),
            "lora": {**lora, "r": r, "alpha": alpha},
            "training": {**grid.training, "learning_rate": rate},
        }
        return {**content, "generate": grid.generate} if grid.generate else content


def prepare_experiment(grid: Grid, folder: Path) -> Experiment:
    """Split the data, check every row's recipe, and match the rows; grid.yaml is replaced last. Raises ValueError: a
    mistake in the grid, or a folder with other rows, or with one of its runs of another recipe."""
    sections: dict[str, DataSection] = {}
    for label, settings in grid.tasks.items():
        data = task_data(label, settings, grid.data_dir)
        sections[label] = check_recipe({"name": label, "model": grid.model, "data": data}, f"tasks.{label}").data
    if not (folder / "grid.yaml").is_file():  # marks the folder of a comparison
        write_file(folder / "grid.yaml", grid.to_yaml())
    splits = {
        label: split_task(label, section, grid.tuning.rows, folder / "data" / label)
        for label, section in sections.items()
    }
    bare = Experiment(grid, folder, splits, {}, {})
    recipes = {entry: _row_recipe(bare, entry) for entry in bare.entries}
    by_kind = {recipe.data.kind: recipe for recipe in recipes.values()}
    models = {kind: BareModel(recipe) for kind, recipe in by_kind.items()}
    for entry, recipe in recipes.items():
        with _naming_row(_where(entry)):
            check_names(models[recipe.data.kind].base, recipe.lora)
    weights = {kind: sum(each.numel() for each in model.base.parameters()) for kind, model in models.items()}
    experiment = Experiment(grid, folder, splits, _match(grid, recipes, models), weights)
    for entry in experiment.entries:  # each job refuses a run of another grid in its folder
        experiment.tuning_jobs(entry)
        for rate in grid.rates(entry.method):
            experiment.reported_jobs(entry, {entry: rate})
    write_file(folder / "grid.yaml", grid.to_yaml())
    return experiment


def _row_recipe(experiment: Experiment, entry: Entry) -> Recipe:
    """Return the resolved recipe of a row. Raise ValueError for a mistake in it."""
    where = _where(entry)
    content = experiment.content(entry, experiment.grid.rates(entry.method)[0], "jobs")
    recipe = check_recipe({"name": entry.task, **content}, where)
    with _naming_row(where):
        recipe = resolve(recipe)
        training_arguments(recipe)
    return recipe


def _where(entry: Entry) -> str:
    return f"methods.{entry.method} on {entry.task}"


@contextmanager
def _naming_row(where: str) -> Iterator[None]:
    """Begin the message of every mistake with the row that makes it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _match(grid: Grid, recipes: Mapping[Entry, Recipe], models: Mapping[str, BareModel]) -> dict[Entry, int]:
    """Return the matched lora.r of every entry; tasks of one kind have the same, because heads are not counted."""
    ranks: dict[tuple[str, str, int], int] = {}
    result = {}
    for entry, recipe in recipes.items():
        if grid.match_of(entry.method) == "rank":
            result[entry] = entry.budget
            continue
        key = (entry.method, recipe.data.kind, entry.budget)
        if key not in ranks:
            baseline = recipes[Entry(grid.baseline, entry.task, entry.budget)]
            ranks[key] = match_parameters(entry.method, recipe, entry.budget, baseline, models[recipe.data.kind])
        result[entry] = ranks[key]
    return result


def split_task(label: str, data: DataSection, tuning_rows: int | None, folder: Path) -> dict[str, Any]:
    """Load and split a task, or read the split in `folder` of an earlier call; return the section of each purpose.

    The reported rows are `data.validation`, or `data.validation_fraction` of the rows. The tuning rows, at most
    `tuning_rows` or as many as `data.eval_rows` says, come off the training rows. Both splits respect `group_by`.
    """
    summary, settings = folder / "splits.json", {**data.model_dump(mode="json"), "tuning_rows": tuning_rows}
    if not summary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files = digests(data.source, data.validation)
        section = _split(label, data, tuning_rows, folder)
        write_file(summary, json.dumps({"asked": settings, "files": files, "data": section}, indent=2) + "\n")
    record = read_json(summary, {"asked": dict, "files": dict, "data": dict})
    if (difference := first_difference(record["asked"], settings)) is not None:
        raise UserError(f"{folder} holds other rows: {difference}; choose another output_dir")
    for file, sha256 in digests(data.source, data.validation).items():
        if record["files"].get(file) != sha256:
            raise UserError(f"{file} has changed since {folder} was made of it; choose another output_dir")
    # Paths are not in the file, so that the folder can be moved.
    paths = {name: str(folder / f"{name}.jsonl") for name in ("train", "reported", "tuning-train", "tuning")}
    return {
        "jobs": {**record["data"], "source": paths["train"], "validation": paths["reported"]},
        "tuning": {**record["data"], "source": paths["tuning-train"], "validation": paths["tuning"]},
    }


def digests(*sources: str | None) -> dict[str, str]:
    """Return file -> SHA-256 of those sources that are local files."""
    files = {file: Path(file).expanduser() for file in sources if file is not None}
    return {file: digest(path) for file, path in files.items() if path.is_file()}


def _split(label: str, data: DataSection, tuning_rows: int | None, folder: Path) -> dict[str, Any]:
    """Write the rows into the folder, and return the keys of `data` that all jobs share."""
    train, test, class_names = load_rows(data)
    if test is None:
        train, test = held_out(train, data.validation_fraction, data.group_by, SEED)
    check_apart(train, test, data.group_by)
    tuning_train, tuning = held_out(train, TUNING, data.group_by, SEED)
    files = {
        "train": train,
        "reported": sample(test, data.eval_rows, SEED, "validation"),
        "tuning-train": tuning_train,
        "tuning": sample(tuning, tuning_rows or data.eval_rows, SEED, "validation"),
    }
    metric = data.metric or METRICS[data.kind][0]
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)  # dates and decimals
        write_file(folder / f"{name}.jsonl", "".join(lines))
    common = data.model_dump(mode="json", exclude_defaults=True, exclude=WHICH_ROWS) | {"metric": metric}
    if data.kind in ("classification", "pairs"):
        # A part of the rows may lack a class, and a file does not have the Hub's names.
        common["labels"] = list(known_labels(train, data, class_names).names)
    return common


class BareModel:
    """The base model of a recipe on torch's meta device, without weights, by which the parameters of adapters are
    counted, without heads."""

    def __init__(self, recipe: Recipe) -> None:
        kind = recipe.data.kind
        classes = {"causal_lm": None, "regression": 1}.get(kind, 2)
        # The adapter of a quantised model is the same.
        section = recipe.model.model_copy(update={"quantization": "none"})
        tokenizer = load_tokenizer(section)
        with torch.device("meta"):
            self.base = shape_of(section, kind, classes, tokenizer)

    def lora_parameters(self, recipe: Recipe, r: int) -> int:
        """Count the parameters of the recipe's LoRA at rank r, without E of the dynamic methods, which is r a layer."""
        lora = recipe.lora.model_copy(update={"r": r, "init": True, **get_method(recipe.method.name).lora})
        return self._count_trained(recipe.model_copy(update={"lora": lora, "method": MethodSection()}))

    def method_parameters(self, recipe: Recipe, r: int) -> int:
        """Count the parameters of the recipe's method at lora.r: of that LoRA, or of a RandLoRA of about its size."""
        if get_method(recipe.method.name).peft_type != "RANDLORA":
            return self.lora_parameters(recipe, r)
        return self._count_trained(recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": r})}))

    def _count_trained(self, recipe: Recipe) -> int:
        with torch.device("meta"):
            parameters = begin_method(recipe, copy.deepcopy(self.base))[0].named_parameters()
        return sum(each.numel() for name, each in parameters if each.requires_grad and "modules_to_save" not in name)


def match_parameters(name: str, recipe: Recipe, budget: int, baseline: Recipe, count: BareModel) -> int:
    """Return the rank at which a row has the trainable parameters of the baseline at lora.r = budget, counted at the
    start of training; of two equally near ones, the smaller. Raises ValueError: the nearest is more than 5 % off."""
    target, at_budget = count.lora_parameters(baseline, budget), count.lora_parameters(recipe, budget)
    # The count grows linearly with the rank.
    low = max(1, budget + (target - at_budget) // (count.lora_parameters(recipe, budget + 1) - at_budget))
    ranks = sorted((low, low + 1), key=lambda r: (abs(count.lora_parameters(recipe, r) - target), r))
    counts = {r: count.method_parameters(recipe, r) for r in ranks}
    if abs(counts[ranks[0]] - target) <= TOLERANCE * target:
        return ranks[0]
    closest = " and ".join(f"{parameters:,} at lora.r {r}" for r, parameters in counts.items())
    repair_hint = f"remove methods.{name}.method.r" if "r" in recipe.method.settings else "choose other budgets"
    raise UserError(
        f"method {name} cannot match the baseline's {target:,} parameters within {TOLERANCE:.0%}: "
        f"the closest are {closest}; {repair_hint}, or methods.{name}.match: rank to compare it as it is"
    )
