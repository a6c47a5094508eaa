"""The rows of a comparison, split once and written down: training, tuning and reported rows, equal for every job.

training rows ──┬── tuning-train ── what a tuning run trains on
                └── tuning ──────── what it is judged on, to choose a learning rate
reported rows ───────────────────── what a reported run is judged on; it trains on all training rows
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pedyra.app.recipe_sections import METRICS, DataSection
from pedyra.app.tasks.sources import Rows, held_out, load_rows, sample
from pedyra.app.tasks.text import known_labels
from pedyra.app.yaml_file import first_difference
from pedyra.lora.files import read_json, write_file

SEED = 0
"""Of the splits, which are the same for every method and seed."""
TUNING = 0.1
"""Part of the training rows that judges tuning runs."""
WHICH_ROWS = {"source", "validation", "config", "split", "validation_fraction", "group_by", "eval_rows"}
"""Keys of `data` that are spent when the rows are split."""


def split_task(label: str, data: DataSection, tuning_rows: int | None, folder: Path) -> dict[str, Any]:
    """Load and split a task, or find it split in `folder` from an earlier call: `Job.purpose` -> the `data` section.

    `data.validation` is what is reported; without it, `data.validation_fraction` of the rows is held out, the
    same rows for every run. The tuning rows come off the training rows. `group_by` holds at both cuts.

    Args:
        tuning_rows: at most this many judge tuning runs; None: as many as `data.eval_rows` says.

    Raises:
        ValueError: whatever stops the data from being read, and a folder with other rows.
    """
    summary, asked = folder / "splits.json", {**data.model_dump(mode="json"), "tuning_rows": tuning_rows}
    if not summary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        section = _split(label, data, tuning_rows, folder)
        write_file(summary, json.dumps({"asked": asked, "data": section}, indent=2) + "\n")
    found = read_json(summary, {"asked": dict, "data": dict})
    if (difference := first_difference(found["asked"], asked)) is not None:
        raise ValueError(f"{folder} holds other rows: {difference}; choose another output_dir")
    # Paths are not in the file, so that the folder can be moved.
    paths = {name: str(folder / f"{name}.jsonl") for name in ("train", "reported", "tuning-train", "tuning")}
    return {
        "jobs": {**found["data"], "source": paths["train"], "validation": paths["reported"]},
        "tuning": {**found["data"], "source": paths["tuning-train"], "validation": paths["tuning"]},
    }


def _split(label: str, data: DataSection, tuning_rows: int | None, folder: Path) -> dict[str, Any]:
    """Write the rows into the folder; what the `data` sections of all jobs have in common."""
    train, reported, class_names = load_rows(data)
    if reported is None:
        train, reported = held_out(train, data.validation_fraction, data.group_by, SEED)
    tuning_train, tuning = held_out(train, TUNING, data.group_by, SEED)
    files = {
        "train": train,
        "reported": sample(reported, data.eval_rows, SEED, "validation"),
        "tuning-train": tuning_train,
        "tuning": sample(tuning, tuning_rows or data.eval_rows, SEED, "validation"),
    }
    metric = data.metric or METRICS[data.kind][0]
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(folder / f"{name}.jsonl", "".join(lines))
    common = data.model_dump(mode="json", exclude_defaults=True, exclude={*WHICH_ROWS})
    return {**common, "metric": metric, **_classes(train, data, class_names)}


def _classes(train: Rows, data: DataSection, class_names: list[str] | None) -> dict[str, Any]:
    """What the classes are: a part of the rows might lack one, and a file does not carry the Hub's names."""
    if data.kind not in ("classification", "pairs"):
        return {}
    known = known_labels(train, data, class_names)
    return {"labels": list(known.names)} if known.names else {"num_labels": known.count}
