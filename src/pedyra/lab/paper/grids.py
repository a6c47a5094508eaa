"""The comparisons that measure an item: one grid for each recipe and rank, shared by all items of a scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pedyra.app.recipe import Recipe
from pedyra.lab.compare.grid import Grid, check_grid
from pedyra.lab.paper.item import Cell, CellPart, Item, Scale
from pedyra.lab.paper.places import Places

RATES = (0.1, 0.3, 1.0, 3.0)
"""Of encoders at scale small: rates that each method chooses from on tuning rows, relative to the recipe's.

At scale full there is one rate, as the paper gives one a task and none for its baselines; language models, whose runs
are long, have one at every scale.
"""

FROM_ZERO = 10.0
"""Times the rates at scale small, for a method that starts with no gradient in A and B (found by
`recipes/compare_short.yaml`). At LoRA's rate PE-DyRA learns nothing in 50 steps of Qwen2.5-Coder-0.5B: perplexity 2.55,
LoRA's 1.74."""

STARTS_FROM_ZERO = (  # but where `lora.init` gives them an update to begin with
    "adalora", "adalora-svd", "increlora", "triadaptlora", "pedyra", "prune", "expand", "random", "mask",
)  # fmt: skip
LANGUAGE = ("causal_lm", "seq2seq")

TUNING_ROWS = 1000
"""That tuning runs are judged on: a tenth of SST-2 would take longer to read than the training."""


@dataclass(frozen=True)
class Measurement:
    """A grid, and the cells of the item that its rows measure."""

    grid: Grid
    recipe: Recipe
    cells: list[Cell]


def measurements(item: Item, scale: Scale, out: Path, places: Places) -> list[Measurement]:
    """The grids of an item, in folders below `out` that other items of the scale share."""
    groups: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in item.cells(scale):
        groups.setdefault((cell.recipe, cell.part.r), []).append(cell)
    found = []
    for (name, r), cells in groups.items():
        recipe = places.resolve(name)
        cells = [_without_the_recipes_own(cell, recipe) for cell in cells]
        r = r or recipe.lora.r
        folder = out / scale / "runs" / f"{name}_r{r}"
        content = grid_content(recipe, [cell.part for cell in cells], scale, r, folder)
        content["seeds"] = item.scales[scale].seeds
        found.append(Measurement(check_grid(content, item.id), recipe, cells))
    return found


def _without_the_recipes_own(cell: Cell, recipe: Recipe) -> Cell:
    """The cell without rank settings that its recipe has too: one run for both."""
    rank = {key: value for key, value in cell.part.rank.items() if recipe.rank.get(key) != value}
    return replace(cell, part=cell.part.model_copy(update={"rank": rank}))


def grid_content(recipe: Recipe, parts: Iterable[CellPart], scale: Scale, r: int, folder: Path) -> dict[str, Any]:
    """The grid with these rows, but for its seeds."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    training = dict(content["training"])
    rate = training.pop("learning_rate")
    alpha = recipe.lora.alpha * r / recipe.lora.r  # the scaling alpha / r is the recipe's at every rank
    factors = RATES if scale == "small" and recipe.data.kind not in LANGUAGE else (1.0,)
    rates = [rate * factor for factor in factors]
    return {
        "name": folder.name,
        "output_dir": str(folder),
        "model": content["model"],
        "lora": {**content.get("lora", {}), "r": r, "alpha": alpha},
        "rank": content.get("rank", {}),
        "training": training,
        "methods": {row_name(part): _row(part, rates, scale) for part in parts},
        "tasks": {recipe.name: content["data"]},
        "learning_rates": rates,
        **({"tuning": {"rows": TUNING_ROWS}} if len(rates) > 1 else {}),
        "match": "rank",  # as the paper compares
        **({"generate": content["generate"]} if content.get("generate") else {}),
    }


def row_name(part: CellPart) -> str:
    """The grid's name of a method with its settings: the same for the same settings, and good as a folder's name."""
    settings = {**part.lora, **part.rank, **({"quantization": part.quantization} if part.quantization else {})}
    return "_".join([str(part.method), *(f"{key}={settings[key]}" for key in sorted(settings))])


def _row(part: CellPart, rates: list[float], scale: Scale) -> dict[str, Any]:
    keys = ("method", "match", "quantization", "lora", "rank")
    row = {key: value for key in keys if (value := getattr(part, key))}
    slow = part.method in STARTS_FROM_ZERO and "init" not in part.lora
    return {**row, **({"learning_rates": [rate * FROM_ZERO for rate in rates]} if slow and scale == "small" else {})}
