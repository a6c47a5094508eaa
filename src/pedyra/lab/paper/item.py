"""A table or figure of the paper: published values, and which run measures which cell. One YAML each, in tables/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from pedyra.app.recipe import Recipe, load_recipe
from pedyra.app.recipe_sections import Section
from pedyra.app.yaml_file import one_line, read_settings
from pedyra.lora.spelling import did_you_mean

Scale = Literal["full", "small", "smoke"]
"""full: as published. small: on a laptop. smoke: tiny random models, seconds."""
SCALES: tuple[Scale, ...] = get_args(Scale)

_HERE = Path(__file__).parent
TABLES, RECIPES = _HERE / "tables", _HERE / "recipes"


class Part(Section):
    """What a row or a column says of its cells; a cell is its row's part and its column's together."""

    method: str | None = None
    recipe: str | None = None
    """Key of the scale's `recipes`."""
    model: str | None = None
    """Put before the recipe's key: llama2 and python make llama2_python."""
    metric: str | None = None
    """A metric of the run's last evaluation or generation, or one of `pedyra.lab.paper.measures`."""
    factor: float | None = None
    """From the measured unit to the published one, e.g. 100."""
    r: int | None = None
    """lora.r; default: the recipe's."""
    match: Literal["parameters"] | None = None
    """Make the trainable parameters LoRA's, for a method whose rank means another thing."""
    quantization: Literal["nf4"] | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    rank: dict[str, Any] = Field(default_factory=dict)
    group: str | None = None
    """Of a row: it is compared with the first of its group; default: what its name has before the last comma."""
    average: bool = False
    """A column that is the mean of the others of its row."""
    over: list[str] | None = None
    """The columns it is the mean of; default: all."""


class AtScale(Section):
    """How an item is measured at one scale."""

    recipes: dict[str, str]
    """Key -> recipe in recipes/. Cells whose key is missing are not measured at this scale."""
    seeds: list[int] = [0]
    columns: list[str] | None = None
    """Only these; default: all."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Column -> metric that stands in for it, under its own name; other columns are then not measured."""
    gpu_gb: float | None = None
    """Memory of the GPU that it needs, estimated; None: no GPU."""
    hours: float
    """Of one seed of all runs, estimated."""


@dataclass(frozen=True)
class Cell:
    """One number that can be measured, and what was published."""

    row: str
    column: str
    recipe: str
    part: Part
    metric: str
    published: float | None

    @property
    def factor(self) -> float:
        return self.part.factor or 1.0


class Item(Section):
    """A table or figure."""

    id: str
    title: str
    claim: str
    """What the paper says that it shows, in one sentence."""
    rows: dict[str, Part]
    columns: dict[str, Part]
    published: dict[str, list[float | None]] = Field(default_factory=dict)
    """Row -> one value a column, without spread, for the paper gives none; empty where its text has no numbers."""
    notes: list[str] = Field(default_factory=list)
    scales: dict[Scale, AtScale]

    @model_validator(mode="after")
    def _fits_together(self) -> Item:
        for row, values in self.published.items():
            if row not in self.rows:
                raise ValueError(f"published.{row} is no row")
            if len(values) != len(self.columns):
                raise ValueError(f"published.{row} has {len(values)} values for {len(self.columns)} columns")
        return self

    @property
    def is_figure(self) -> bool:
        return self.id.startswith("figure")

    def value(self, row: str, column: str) -> float | None:
        """The published value; None where the paper has none."""
        values = self.published.get(row)
        return None if values is None else values[list(self.columns).index(column)]

    def only(self, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Item:
        """The item with these rows and columns alone; none named: all. Raises ValueError with the nearest name."""
        for what, names, known in (("row", rows, self.rows), ("column", columns, self.columns)):
            for name in names:
                if name not in known:
                    raise ValueError(f"{self.id} has no {what} {name!r}; {did_you_mean(name, known)}")
        kept = {row: part for row, part in self.rows.items() if row in rows or not rows}
        places = [place for place, column in enumerate(self.columns) if column in columns or not columns]
        return self.model_copy(
            update={
                "rows": kept,
                "columns": {name: self.columns[name] for name in (list(self.columns)[place] for place in places)},
                "published": {
                    row: [values[place] for place in places] for row, values in self.published.items() if row in kept
                },
            }
        )

    def at(self, scale: Scale) -> Item:
        """The item as the scale shows it: a metric that stands in for a column has its own name, and none published."""
        at = self.scales[scale]
        metrics = {column: metric for column, metric in at.metrics.items() if column in self.columns}
        if not at.metrics:
            return self
        columns = {
            metrics.get(name, name): part.model_copy(update={"metric": metrics[name], "factor": None})
            if name in metrics
            else part
            for name, part in self.columns.items()
        }
        published = {
            row: [None if name in metrics else value for name, value in zip(self.columns, values, strict=True)]
            for row, values in self.published.items()
        }
        notes = [
            f"{metric} stands for {column}, which is not measured at this scale." for column, metric in metrics.items()
        ]
        shown = at.model_copy(update={"columns": list(metrics.values()), "metrics": {}})
        more = {"notes": [*notes, *self.notes], "scales": {**self.scales, scale: shown}}
        return self.model_copy(update={"columns": columns, "published": published, **more})

    def cells(self, scale: Scale) -> Iterator[Cell]:
        """The cells that the scale measures, row by row; averages follow from them."""
        item = self.at(scale)
        at = item.scales[scale]
        measured = item.columns if at.columns is None else at.columns
        for row, first in item.rows.items():
            for column, second in item.columns.items():
                part = merged(first, second)
                key = "_".join(name for name in (part.model, part.recipe) if name)
                if not part.average and column in measured and key in at.recipes:
                    assert part.metric is not None
                    yield Cell(row, column, at.recipes[key], part, part.metric, item.value(row, column))


def merged(row: Part, column: Part) -> Part:
    """What both say; of a key that both have, the column's, and of settings, both."""
    settings = {key: {**getattr(row, key), **getattr(column, key)} for key in ("lora", "rank")}
    return Part.model_validate(
        {**row.model_dump(exclude_unset=True), **column.model_dump(exclude_unset=True), **settings}
    )


@cache
def items() -> dict[str, Item]:
    """Every table and figure by id: tables first, each in the paper's order."""
    found = [_load(path) for path in TABLES.glob("*.yaml")]
    return {item.id: item for item in sorted(found, key=_order)}


def get_item(name: str) -> Item:
    """The item of this id; "Table 2" and "fig4a" are understood. Raises ValueError with the nearest id."""
    known = items()
    wanted = name.lower().replace(" ", "").replace("_", "").replace("-", "")
    if wanted.startswith("fig") and not wanted.startswith("figure"):
        wanted = f"figure{wanted.removeprefix('fig').removeprefix('.')}"
    if wanted in known:
        return known[wanted]
    raise ValueError(f"{name!r} is no table or figure that can be run; {did_you_mean(wanted, known)}")


def recipe_path(name: str) -> Path:
    """The file of a recipe, e.g. sst2 or smoke_encoder."""
    return RECIPES / f"{name}.yaml"


@cache
def recipe(name: str) -> Recipe:
    """The recipe of this name."""
    return load_recipe(recipe_path(name))


def _load(path: Path) -> Item:
    content = read_settings(path, (), what="table", starts_with="id")
    try:
        return Item.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {one_line(error, Item, depth=3)}") from None


def _order(item: Item) -> tuple[bool, int, str]:
    digits = "".join(character for character in item.id if character.isdigit())
    return item.is_figure, int(digits), item.id
