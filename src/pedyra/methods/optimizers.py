"""The optimizer that Trainer would make, for methods that group its parameters in another way."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names


def optimizer_class(model: nn.Module, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class that `args.optim` names and its arguments, lr among them."""
    return Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]


def split_by_decay(model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Trainer's two groups of these parameters: no weight decay for biases and norms."""
    decays = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    groups = ((weight_decay, True), (0.0, False))
    return [
        {"params": [p for name, p in parameters.items() if (name in decays) == which], "weight_decay": decay}
        for decay, which in groups
    ]
