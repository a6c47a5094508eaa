"""Tasks that a grid names: the eight GLUE tasks with their official metrics, `gsm8k`, `reviews`, `toy` and `planted`.

A task is the `data` section of a recipe. GLUE and GSM8K come from the Hub, or `<data_dir>/<task>/<split>.jsonl.gz`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

GLUE_HUB = "nyu-mll/glue"

# The judged metric is the first of the official ones: MRPC and QQP report accuracy and F1, STS-B Pearson and Spearman
# (the other one is in each result's `metrics`). MNLI is judged on the matched set.
GLUE: dict[str, dict[str, Any]] = {
    "cola": {"kind": "classification", "text": "sentence", "metric": "matthews"},
    "sst2": {"kind": "classification", "text": "sentence", "metric": "accuracy"},
    "mrpc": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
    "qqp": {"kind": "pairs", "text": "question1", "text_pair": "question2", "metric": "accuracy"},
    "stsb": {"kind": "regression", "text": "sentence1", "text_pair": "sentence2", "metric": "pearson"},
    "mnli": {"kind": "pairs", "text": "premise", "text_pair": "hypothesis", "metric": "accuracy"},
    "qnli": {"kind": "pairs", "text": "question", "text_pair": "sentence", "metric": "accuracy"},
    "rte": {"kind": "pairs", "text": "sentence1", "text_pair": "sentence2", "metric": "accuracy"},
}

# Judged by the perplexity of the answers alone.
GSM8K: dict[str, Any] = {"kind": "causal_lm", "template": "Question: {question}\nAnswer:\n", "completion": "answer"}

HUB = {**GLUE, "gsm8k": GSM8K}

# name -> repository, configuration and held-out split on the Hub.
_HUB_SOURCES = {name: (GLUE_HUB, name, "validation") for name in GLUE}
_HUB_SOURCES |= {"mnli": (GLUE_HUB, "mnli", "validation_matched"), "gsm8k": ("openai/gsm8k", "main", "test")}

PACKAGED: dict[str, dict[str, Any]] = {
    "reviews": {"source": "reviews", "group_by": "movie", "metric": "accuracy"},
    "toy": {"source": "toy", "group_by": "group", "metric": "accuracy"},
    "planted": {"source": "planted", "kind": "planted"},
}

NAMES = (*HUB, *PACKAGED)


def task_data(label: str, settings: Mapping[str, Any] | None, data_dir: str | None) -> dict[str, Any]:
    """The `data` section of one task of a grid.

    Args:
        label: the task's name in the grid; the name of a known task unless `settings` say otherwise.
        settings: keys of `data`. With `source` they are a task of their own; without, they change the named task
            `task` (default: the label), whose local files are in the folder `folder` (default: that name).
        data_dir: where local files of GLUE and GSM8K are; None: from the Hub.

    Raises:
        ValueError: no such task, with the nearest. Whether its files are there is seen when they are read.
    """
    changes = dict(settings or {})
    if "source" in changes:
        for key in ("task", "folder"):
            if key in changes:
                raise ValueError(f"tasks.{label}.{key} is for named tasks, and this one has a source; remove one")
        return changes
    name = changes.pop("task", label)
    folder = changes.pop("folder", name)
    if name not in NAMES:
        near = get_close_matches(str(name), NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}."
        raise ValueError(f"task {name!r} is unknown; {hint} A task of your own has a source (tasks.{label}.source)")
    if name in PACKAGED:
        return {**PACKAGED[name], **changes}
    repository, configuration, held_out = _HUB_SOURCES[name]
    if data_dir is None:
        source = {"source": repository, "config": configuration, "validation": held_out}
    else:
        source = _local_source(Path(data_dir).expanduser() / folder, held_out.removesuffix("_matched"))
    return {**source, **HUB[name], **changes}


def task_model(data: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a task's jobs: the grid's, but for the planted problem, which has a base of its own."""
    if data.get("kind") == "planted":
        return {"name": f"planted-{data.get('profile', 'design')}"}
    return dict(model)


def _local_source(folder: Path, held_out: str) -> dict[str, Any]:
    def file(split: str) -> str:
        plain = folder / f"{split}.jsonl"
        return str(plain if plain.is_file() else plain.with_suffix(".jsonl.gz"))

    return {"source": file("train"), "validation": file(held_out)}
