"""The planted-rank problem as a model and a task: what a recipe or a grid names `planted`.

A row is a number: it seeds a Gaussian vector, and the teacher's output of that vector is its target. One problem per
profile: a run's seed changes the adapter and the order of the rows, not the problem. The model is the problem's base,
so a recipe names both (`model.name: planted-design`, `data.profile: design`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from pedyra.experiments.planted import Problem, ResidualMLP, make_problem
from pedyra.tasks.split import Rows
from pedyra.tasks.task import Task

PROBLEM_SEED = 0


@lru_cache(maxsize=1)
def problem_of(profile: str) -> Problem:
    """Twelve layers of width 64, true ranks of sum 48. Raises ValueError for an unknown profile."""
    return make_problem(profile, PROBLEM_SEED)


class PlantedConfig(PreTrainedConfig):
    """The sizes of the model."""

    model_type = "pedyra-planted"

    def __init__(self, width: int = 64, depth: int = 12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width, self.depth = width, depth


class PlantedBase(PreTrainedModel):
    """The base of a planted problem as transformers' Trainer takes it; `inputs` and `labels` are `(batch, 64)`."""

    config_class = PlantedConfig
    main_input_name = "inputs"

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.body = ResidualMLP(config.width, config.depth)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """They come from the problem."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        outputs = self.body(inputs)
        loss = None if labels is None else (outputs - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=outputs)  # pyright: ignore[reportArgumentType]


def base_model(profile: str) -> PlantedBase:
    """The untouched base of the problem, a copy of its own."""
    base = problem_of(profile).base
    model = PlantedBase(PlantedConfig(base.width, len(base.layers)))
    model.body.load_state_dict(base.state_dict())
    return model


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
