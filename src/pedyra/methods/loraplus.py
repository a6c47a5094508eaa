"""LoRA+ (Hayou et al. 2024): B learns `ratio` times faster than A. PEFT's optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from pedyra.methods.adapter import with_lora
from pedyra.methods.method import Adaptation
from pedyra.methods.optimizers import optimizer_class
from pedyra.methods.settings import method_settings, require
from pedyra.recipe import Recipe
from pedyra.tasks import Task


@dataclass(frozen=True, kw_only=True)
class LoraPlusSettings:
    """Settings of LoRA+."""

    ratio: float = 16.0
    """Learning rate of B over that of A. The authors use 10 to 80 with about half of LoRA's rate; 16 is the paper's."""

    def __post_init__(self) -> None:
        require(self.ratio >= 1, f"method_settings.ratio is {self.ratio}; B learns at least as fast as A, so 1 or more")


def prepare(base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None) -> Adaptation:
    """LoRA, with `training.learning_rate` for A and `ratio` times that for B, and for biases, as PEFT groups them.

    Departs from the authors' code in nothing; it is PEFT's `create_loraplus_optimizer` with `training.weight_decay`.
    """
    settings = method_settings(recipe, LoraPlusSettings)

    def make_optimizer(model: PeftModel, args: TrainingArguments) -> Optimizer:
        kind, arguments = optimizer_class(model, args)
        arguments = {**arguments, "loraplus_weight_decay": args.weight_decay}
        return create_loraplus_optimizer(model, kind, loraplus_lr_ratio=settings.ratio, **arguments)

    return Adaptation(model=with_lora(base_model, recipe), optimizer=make_optimizer)
