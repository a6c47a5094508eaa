"""The recipe of an adapter: the base and the rows of its fit or proof."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pedyra.app.models.base import names_model
from pedyra.app.recipe import Recipe, check_recipe, load_recipe
from pedyra.app.recipe_sections import GENERATED, ModelSection
from pedyra.app.runs.run_folder import RunFolder, run_of
from pedyra.app.runs.setup import resolve
from pedyra.app.runs.source import Source
from pedyra.app.tasks.sources import Rows, check_file, read_test_rows
from pedyra.app.tasks.text import class_number
from pedyra.errors import UserError
from pedyra.export.loading import num_labels
from pedyra.fitting.fit import CALIBRATING
from pedyra.fitting.logits import NUMBERS
from pedyra.lora.folder import SavedLora

COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "SEQ_CLS": ("classification", {"text": "text", "label": "label"}),
    "CAUSAL_LM": ("causal_lm", {"prompt": "prompt", "completion": "completion"}),
}
"""PEFT's task_type -> data.kind, and the columns of rows without a recipe; a language model's may be `messages`."""


def recipe_of(path: Path, lora: SavedLora, source: Source) -> Recipe:
    """Return the recipe of the run, or one of the adapter's base and the rows."""
    folder = source.folder(path)
    if source.data is not None:
        check_file(str(source.data), "--data")
    if folder is None:
        return _recipe_of_rows(path, lora, source)
    recipe = resolve(load_recipe(folder / "recipe.yaml"))
    if source.run is not None:
        _tell_other_base(lora, recipe.model, folder)
    if source.data is None:
        return recipe
    content = recipe.model_dump()
    rows = read_test_rows(str(source.data), None, "train", None, "--data")
    content["data"] |= {
        **_columns(rows, recipe.data.model_dump(), folder),
        "max_length": source.max_length or recipe.data.max_length,
        "labels": recipe.data.labels or RunFolder(folder).recorded("classes"),  # else sorted by name
        "source": str(source.data),
        # Settings of the run's own data set, which may be one of the Hub.
        "config": None,
        "split": "train",
        "validation": None,
        "validation_fraction": _proving(rows),
        "group_by": recipe.data.group_by if any(recipe.data.group_by in row for row in rows) else None,
        "train_rows": None,
        "eval_rows": None,
    }
    return check_recipe(content, str(folder))


def _recipe_of_rows(path: Path, lora: SavedLora, source: Source) -> Recipe:
    if source.data is None:
        raise UserError(f"{path} says nothing of its data; give --data ROWS.jsonl, or --run RUN")
    task = lora.config.get("task_type")
    if task not in COLUMNS:
        raise UserError(
            f"the adapter's task_type is {task!r}, and rows without a run are read for {' and '.join(COLUMNS)}; give "
            f"--run RUN, whose recipe says what the columns mean"
        )
    name = lora.config.get("base_model_name_or_path")
    if not name:
        raise UserError("the adapter names no base model (base_model_name_or_path); give --run RUN, which does")
    kind, columns = COLUMNS[task]
    rows = read_test_rows(str(source.data), None, "train", None, "--data")
    columns = {**columns, **_columns(rows, {"kind": kind, **columns}, source.data)}
    model = {"name": name, "revision": lora.config.get("revision"), **source.loading}
    if (lora.folder / "tokenizer_config.json").is_file():  # the training's, with its chat template
        model["tokenizer"] = str(lora.folder)
    data = {"source": str(source.data), "kind": kind, **columns, "max_length": source.max_length}
    if kind == "classification":
        _check_labels(lora, rows, source.data)
        data["num_labels"] = num_labels(lora)
    content = {"name": "fit", "model": model, "data": {**data, "validation_fraction": _proving(rows)}}
    return check_recipe(content, str(source.data))


def _tell_other_base(lora: SavedLora, model: ModelSection, folder: Path) -> None:
    """Warn where the adapter names another base than the run that it is measured with."""
    recorded = lora.config.get("base_model_name_or_path")
    if recorded and run_of(lora.folder) != folder and not names_model(recorded, model):
        warnings.warn(
            f"{lora.title} is an adapter of the base {recorded}, and the run {folder} is of {model.name}: if these are "
            f"not the same model, nothing that is measured here is about this adapter",
            stacklevel=3,
        )


def _proving(rows: Rows) -> float:
    """Return the part of the rows that prove: half of them, or all but those that can calibrate."""
    return max(0.5, 1 - CALIBRATING / max(1, len(rows)))


def _columns(rows: Rows, data: Mapping[str, Any], where: Path) -> dict[str, str | None]:
    """Return the columns of these rows where they are not those of `data`: none for labels that no row has, and for a
    language model's rows the chat or the text that they have instead of a prompt."""
    first = rows[0] if rows else {}
    names = [data[name] for name in ("prompt", "messages") if data.get(name)]
    if data["kind"] == "causal_lm" and first and names and names[0] not in first:
        if alternative := next((name for name in ("messages", "text") if name in first), None):
            key = "messages" if alternative == "messages" else "completion"
            return {"prompt": None, "messages": None, "completion": None, key: alternative}
        raise UserError(
            f"the rows have the columns {', '.join(map(str, first))}, and not {names[0]!r}; a language model takes "
            f"prompt (and completion), messages or text: rename one, or give --run RUN, whose recipe names others"
        )
    key = "completion" if data["kind"] in GENERATED else "label"
    column = data.get(key)
    if column is None or data["kind"] == "question_answering" or any(column in row for row in rows):
        return {}
    if data["kind"] == "regression":
        raise UserError(f"the rows have no column {column!r}, and {where} is of a regression: {NUMBERS}; give labels")
    return {key: None}


def _check_labels(lora: SavedLora, rows: Rows, data: Path) -> None:
    """Refuse class names in rows without a recipe, because the number of each in the head is unknown."""
    if num_labels(lora) == 1:
        raise UserError(f"the head of {lora.title} has one output, which is a regression; give --run RUN, its run")
    labels = {row["label"] for row in rows if str(row.get("label", "")).strip()}  # an empty one is refused later
    if class_names := [str(label) for label in labels if class_number(label) is None]:
        raise UserError(
            f"the rows of {data} name their classes ({', '.join(sorted(class_names)):.200}), and nothing says which "
            f"number each has in the head of {lora.title}; write the number, from 0 on, as label, or leave the column "
            f"out, or give --run RUN"
        )
