"""A table or figure of the paper, by a YAML in tables/: the published numbers, and the run that measures each cell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.recipe_sections import Section
from pedyra.app.yaml_file import read_settings
from pedyra.errors import UserError
from pedyra.lora.spelling import did_you_mean

Scale = Literal["full", "small", "smoke"]
"""full: as published. small: on a laptop. smoke: tiny random models, seconds."""
SCALES: tuple[Scale, ...] = get_args(Scale)

_HERE = Path(__file__).parent
TABLES, RECIPES = _HERE / "tables", _HERE / "recipes"
CODE = {"humaneval", "humanevalplus", "mbpp", "mbppplus"}
"""Metrics that run generated code."""


class CellPart(Section):
    """The settings of a row or a column; a cell has those of both."""

    method: str | None = None
    recipe: str | None = None
    """Key of the scale's `recipes`."""
    model: str | None = None
    """Put before the recipe's key: llama2 and python make llama2_python."""
    metric: str | None = None
    """A metric of the run's last evaluation or generation, or one of `pedyra.lab.paper.figures`."""
    factor: float = 1.0
    """The published number is the measured one times this, e.g. 100."""
    r: int | None = None
    """lora.r; default: the recipe's."""
    match: Literal["parameters"] | None = None
    """Make the trainable parameters LoRA's, for a method whose rank means another thing."""
    quantization: Literal["nf4"] | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of the method's class."""
    group: str | None = None
    """A row is compared with the first of its group; default: what its name has before the last comma."""
    average: bool = False
    """The column is the mean of the others of its row."""
    over: list[str] | None = None
    """The columns it is the mean of; default: all."""

    def with_column(self, column: CellPart) -> CellPart:
        """Merge the two: the column's value wins, and mappings are merged."""
        settings = {key: {**getattr(self, key), **getattr(column, key)} for key in ("lora", "settings")}
        both = {**self.model_dump(exclude_unset=True), **column.model_dump(exclude_unset=True), **settings}
        return CellPart.model_validate(both)


DATA_SETS = {"sst2": "SST-2", "cola": "CoLA"}
"""Key of a recipe -> the name of its data set in rows and columns, where scale smoke has generated rows."""


class AtScale(Section):
    """How an item is measured at one scale."""

    recipes: dict[str, str]
    """Key -> recipe in recipes/. Cells whose key is missing are not measured at this scale."""
    seeds: list[int] = [0]
    columns: dict[str, CellPart] | None = None
    """Columns in place of the item's, for which tiny models are too poor; None: the item's."""
    gpu_gb: float | None = None
    """About the GPU memory in GB; None: no GPU is needed."""
    hours: float
    """About the hours of all runs of one seed."""


@dataclass(frozen=True)
class Cell:
    """One number that can be measured."""

    row: str
    column: str
    recipe: str
    part: CellPart
    metric: str


class Item(Section):
    """A table or figure of the paper."""

    id: str
    title: str
    claim: str
    """What it shows according to the paper, in one sentence."""
    rows: dict[str, CellPart]
    columns: dict[str, CellPart]
    published: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """Row -> column -> value, without spread, for the paper gives none; a list in the YAML, and empty where the paper's
    text has no numbers."""
    baseline: str | None = None
    """Columns that are settings of one method are compared with this one; default: the first."""
    notes: list[str] = Field(default_factory=list)
    scales: dict[Scale, AtScale]

    @model_validator(mode="before")
    @classmethod
    def _values_by_column(cls, content: Any) -> Any:
        """Name the values of a row's published list by their columns."""
        lists = content.get("published", {})
        published = {row: dict(zip(content["columns"], values, strict=True)) for row, values in lists.items()}
        return {**content, "published": published}

    @property
    def is_figure(self) -> bool:
        return self.id.startswith("figure")

    def value(self, row: str, column: str) -> float | None:
        """Return the published value; None where the paper has none."""
        return self.published.get(row, {}).get(column)

    def only(self, rows: Collection[str] = (), columns: Collection[str] = ()) -> Item:
        """Keep these rows and columns alone; none named: all. Raise ValueError with the nearest name."""
        for what, names, parts in (("row", rows, self.rows), ("column", columns, self.columns)):
            for name in names:
                if name not in parts:
                    raise UserError(f"{self.id} has no {what} {name!r}; {did_you_mean(name, parts)}")
        selection = {
            "rows": {name: part for name, part in self.rows.items() if name in rows or not rows},
            "columns": {name: part for name, part in self.columns.items() if name in columns or not columns},
        }
        return self.model_copy(update=selection)

    def check(self, scale: Scale, *, allow_code_execution: bool) -> None:
        """Refuse, before the training, a scale that measures no cell, and generated code without permission or
        sandbox."""
        metrics = {cell.metric for cell in self.cells(scale)}
        if not metrics:
            raise UserError(f"{self.id} measures no such cell at scale {scale}; name other rows or columns, or a scale")
        runs_code = metrics & CODE
        if runs_code and not allow_code_execution:
            raise UserError(
                f"{self.id} at scale {scale} runs programs that a model wrote ({', '.join(sorted(runs_code))}); "
                f"--allow-code-execution does so, in a sandbox"
            )
        if runs_code:
            from pedyra.app.tasks.sandbox import Sandbox

            Sandbox()

    def at(self, scale: Scale) -> Item:
        """Return the item with the columns of the scale; at scale smoke, whose tiny random models learn nothing from
        generated rows, without published numbers and names of data sets."""
        item = self.model_copy(update={"columns": self.scales[scale].columns or self.columns})
        if scale != "smoke":
            return item
        names = "|".join(DATA_SETS[key] for key in self.scales[scale].recipes if key in DATA_SETS) or "(?!)"
        rows, columns = (
            {re.sub(names, "toy", name): part for name, part in each.items()} for each in (item.rows, item.columns)
        )
        return item.model_copy(update={"rows": rows, "columns": columns, "published": {}})

    def needs(self, scale: Scale) -> dict[str, list[str]]:
        """Return the models and data sets that a scale names."""
        # Unchecked, because a check imports torch.
        recipes = [_written(name) for name in self.scales[scale].recipes.values()]
        data = [each["data"]["source"] + (f"/{c}" if (c := each["data"].get("config")) else "") for each in recipes]
        return {
            "model": list(dict.fromkeys(each["model"]["name"] for each in recipes)),
            "data": list(dict.fromkeys(data)),
        }

    def cells(self, scale: Scale) -> Iterator[Cell]:
        """Yield the cells that the scale measures, row by row; averages follow from them."""
        recipes = self.scales[scale].recipes
        for row, first in self.at(scale).rows.items():
            for column, second in self.at(scale).columns.items():
                part = first.with_column(second)
                key = "_".join(name for name in (part.model, part.recipe) if name)
                if part.metric is not None and key in recipes:
                    yield Cell(row, column, recipes[key], part, part.metric)


@cache
def items() -> dict[str, Item]:
    """Return every table and figure by id: tables first, each in the paper's order."""
    contents = (read_settings(path, (), what="table", starts_with="id") for path in TABLES.glob("*.yaml"))
    result = [Item.model_validate(content) for content in contents]
    result.sort(key=lambda item: (item.is_figure, int("".join(filter(str.isdigit, item.id))), item.id))
    return {item.id: item for item in result}


def get_item(name: str) -> Item:
    """Find the item of this id. Raises ValueError with the nearest id."""
    if name not in items():
        raise UserError(f"{name!r} is no table or figure that can be run; {did_you_mean(name, items())}")
    return items()[name]


@cache
def _written(name: str) -> dict[str, Any]:
    return read_settings(RECIPES / f"{name}.yaml", (), what="recipe", starts_with="method")


@cache
def recipe(name: str) -> Recipe:
    """Return the recipe of this name, e.g. sst2 or smoke_encoder."""
    return load_recipe(RECIPES / f"{name}.yaml")
