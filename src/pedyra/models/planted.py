"""The base of the planted-rank problem as a model that transformers' Trainer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pedyra.tasks.planted_problem import ResidualMLP, problem_of


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
