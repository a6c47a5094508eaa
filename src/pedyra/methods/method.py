"""What a method is: a name, a line about it, and how it turns a base model into one that is ready to be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pedyra.recipe import Recipe

if TYPE_CHECKING:  # the list of methods is shown without loading torch
    from pathlib import Path

    from peft import PeftModel
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from pedyra.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A model with its adapter, and what has to happen around a Trainer's run on it.

    Whoever trains passes `callbacks` to the Trainer, gives it `optimizer(model, args)` where there is one, calls
    `finish` after training and before evaluating and saving, and then calls `save_pretrained` on `model`.
    """

    model: PeftModel
    callbacks: Sequence[TrainerCallback] = ()
    optimizer: Callable[[PeftModel, TrainingArguments], Optimizer] | None = None
    """Makes the optimizer once the training arguments are known; None: the one Trainer makes."""
    finish: Callable[[], None] | None = None
    """Changes `model` in place after training, e.g. truncates its ranks; None: nothing is to be done."""


class Prepare(Protocol):
    """Gives a base model its adapter."""

    def __call__(
        self, base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None
    ) -> Adaptation:
        """`record_to` is the ranks.jsonl of a rank-adaptive method. `recipe` must be resolved by the method.

        The global seeds are set to the recipe's first, so that what is drawn is the same for every method.

        Raises:
            ValueError: the method cannot do what the recipe asks for; with the value, the rule and the repair.
        """
        ...


@dataclass(frozen=True)
class Method:
    """One row of a comparison, by the name a recipe gives as `method`."""

    name: str
    summary: str
    """One line: what it does and where it comes from."""
    prepare: Prepare
    resolve: Callable[[Recipe], Recipe] = lambda recipe: recipe
    """The recipe with what the method presupposes filled in, before the base model is loaded (qlora: nf4).

    Raises ValueError, like `prepare`, for what can be told from the recipe alone.
    """
    resumable: bool = True
    """Whether a run can continue from a checkpoint."""
    takes_ranks: bool = False
    """Whether it keeps the ranks that `lora.ranks` gives the layers; others choose ranks themselves, or share them."""
