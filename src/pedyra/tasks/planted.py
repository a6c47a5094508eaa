"""The planted-rank problem as a task: what a recipe or a grid names `planted`.

A row is a number: it seeds a Gaussian vector, and the teacher's output of that vector is its target. A recipe names
both the problem and its model (`data.profile: design`, `model.name: planted-design`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, default_data_collator

from pedyra.tasks.planted_problem import problem_of
from pedyra.tasks.split import Rows
from pedyra.tasks.task import Task


def planted_task(train: Rows, evaluation: Rows, profile: str) -> Task:
    """Rows of `{"row": number}` as vectors and the teacher's outputs, judged by the error relative to the base's."""
    return Task(
        kind="planted",
        train=_vectors(train, profile),
        eval=_vectors(evaluation, profile),
        collator=default_data_collator,
        num_labels=None,
        label_names=None,
        compute_metrics=_relative_error(evaluation, profile),
        preprocess_logits=None,
        metric="relative_error",
        greater_is_better=False,
    )


def _inputs(rows: Rows) -> Tensor:
    width = problem_of("design").base.width
    numbers: Sequence[int] = [int(row["row"]) for row in rows]
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(number)) for number in numbers])


def _vectors(rows: Rows, profile: str) -> Dataset:
    x = _inputs(rows)
    return Dataset.from_dict({"inputs": x.numpy(), "labels": problem_of(profile).teacher(x).numpy()})


def _relative_error(rows: Rows, profile: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Mean squared distance to the teacher, over that of the untouched base on the same rows."""
    x = _inputs(rows)
    problem = problem_of(profile)
    untouched = float((problem.base(x) - problem.teacher(x)).square().mean())

    def metric(prediction: EvalPrediction) -> dict[str, float]:
        error = np.square(np.asarray(prediction.predictions) - np.asarray(prediction.label_ids)).mean()
        return {"relative_error": float(error) / untouched}

    return metric
