"""The rows of a comparison, split once and written down: training, tuning and reported rows, equal for every job.

training rows ──┬── tuning-train ── what a tuning run trains on
                └── tuning ──────── what it is judged on, to choose a learning rate
reported rows ───────────────────── what a reported run is judged on; it trains on all training rows
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedyra.app.recipe_sections import METRICS, DataSection
from pedyra.app.tasks.sources import Rows, held_out, load_rows, sample
from pedyra.app.tasks.text import known_labels
from pedyra.lora.files import read_json, write_file

SEED = 0
"""Of the splits, which are the same for every method and seed."""
TUNING = 0.1
"""Part of the training rows that judges tuning runs."""


@dataclass(frozen=True)
class TaskSplits:
    """The `data` sections of one task's jobs."""

    reported: dict[str, Any]
    tuning: dict[str, Any]
    digest: str
    """Of all rows: equal on every machine whose results may be put together."""


def split_task(label: str, data: DataSection, tuning_rows: int | None, folder: Path) -> TaskSplits:
    """Load and split a task, or find it split in `folder` from an earlier call.

    `data.validation` is what is reported; without it, `data.validation_fraction` of the rows is held out, the
    same rows for every run. The tuning rows come off the training rows. `group_by` holds at both cuts.

    Args:
        tuning_rows: at most this many judge tuning runs; None: as many as `data.eval_rows` says.

    Raises:
        ValueError: whatever stops the data from being read, and a metric that a split cannot be judged by.
    """
    summary = folder / "splits.json"
    if not summary.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(summary, json.dumps(_split(label, data, tuning_rows, folder), indent=2) + "\n")
    found = read_json(summary, {"digest": str, "data": dict})

    def section(train: str, judged: str) -> dict[str, Any]:
        # Paths are not in the file, so that the folder can be moved.
        paths = {"source": f"{folder / train}.jsonl", "validation": f"{folder / judged}.jsonl"}
        return {**found["data"], **paths}

    return TaskSplits(
        reported=section("train", "reported"), tuning=section("tuning-train", "tuning"), digest=found["digest"]
    )


def _split(label: str, data: DataSection, most: int | None, folder: Path) -> dict[str, Any]:
    train, reported, class_names = load_rows(data)
    if reported is None:
        train, reported = held_out(train, data.validation_fraction, data.group_by, SEED)
    reported = sample(reported, data.eval_rows, SEED, "validation")
    tuning_train, tuning_rows = held_out(train, TUNING, data.group_by, SEED)
    tuning_rows = sample(tuning_rows, most or data.eval_rows, SEED, "validation")
    metric = data.metric or METRICS[data.kind][0]
    labelled = data.kind in ("classification", "pairs", "regression")
    for rows, split in ((reported, "reported"), (tuning_rows, "tuning")) if labelled else ():
        _check_metric(label, metric, [row.get(data.label) for row in rows], split)

    files = {"train": train, "reported": reported, "tuning-train": tuning_train, "tuning": tuning_rows}
    digest = hashlib.sha256()
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(folder / f"{name}.jsonl", text)
        digest.update(text.encode())
    common = data.model_dump(mode="json", exclude_defaults=True)
    for key in ("source", "validation", "config", "split", "validation_fraction", "group_by", "eval_rows"):
        common.pop(key, None)
    common |= {"metric": metric, **_labels(train, data, class_names)}
    counts = {name: len(rows) for name, rows in files.items()}
    return {"data": common, "rows": counts, "digest": digest.hexdigest()[:16]}


def _labels(train: Rows, data: DataSection, class_names: list[str] | None) -> dict[str, Any]:
    """What the classes are, told: a part of the rows might lack one, and a file does not carry the Hub's names."""
    if data.kind not in ("classification", "pairs"):
        return {}
    known = known_labels(train, data, class_names)
    return {"labels": list(known.names)} if known.names else {"num_labels": known.count}


NEEDS_TWO_LABELS = ("matthews", "f1", "pearson", "spearman")
"""Metrics that say nothing where all rows have one label."""


def _check_metric(label: str, metric: str, labels: list[Any], split: str) -> None:
    if metric in NEEDS_TWO_LABELS and len({str(value) for value in labels}) < 2:
        raise ValueError(
            f"task {label}: all {len(labels)} {split} rows have the label {labels[0]!r}, and {metric} is undefined "
            f"there; give more rows (data.eval_rows, tuning.rows), or take the metric accuracy"
        )
