"""A method runs in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from pedyra.errors import UserError
from pedyra.methods.method import Adaptation, Running
from pedyra.trainer.adapt import RankTraining, adapt


def train_as(adaptation: Adaptation, trainer: Trainer, record_to: Path | None = None) -> RankTraining | None:
    """Have a Trainer, before it has an optimizer, train as the method does.

    Args:
        record_to: the ranks.jsonl of a method that moves ranks.

    Returns:
        The handle of `adapt`; None where the method keeps every rank as it is.
    """
    ranks = None if adaptation.ranks is None else adapt(trainer, adaptation.ranks, record_to=record_to)
    # Before the reporters: what it adds to a log is then seen by them.
    trainer.callback_handler.callbacks.insert(int(ranks is not None), MethodCallback(adaptation, trainer, ranks))
    return ranks


def trainer_optimizer(adaptation: Adaptation, args: TrainingArguments) -> Optimizer | None:
    """Make the optimizer for `Trainer(optimizers=(..., None))`; None: Trainer makes its own. Raises ValueError:
    arguments that the method cannot train under."""
    check_arguments(adaptation.refused, args)
    if adaptation.optimizer is None:
        return None
    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, adaptation.model)  # type: ignore[arg-type]
    return adaptation.optimizer(kind, arguments, args.weight_decay)


def check_arguments(refused: Mapping[str, str], args: TrainingArguments) -> None:
    """Raise ValueError for an argument that is set and must not be, with the reason."""
    for name, reason in refused.items():
        if value := getattr(args, name):
            raise UserError(f"training.{name} is {value!r}, but {reason}")


class MethodCallback(TrainerCallback):
    """A method's hooks are called at Trainer's events."""

    def __init__(self, adaptation: Adaptation, trainer: Trainer, ranks: RankTraining | None) -> None:
        self.adaptation, self.trainer, self.ranks = adaptation, trainer, ranks

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        divides = self.trainer.model_accepts_loss_kwargs
        # Trainer multiplies such a loss by their number, since the gradient is averaged over them.
        processes = args.world_size if args.average_tokens_across_devices else 1
        run = Running(
            total_steps=state.max_steps,
            allocator=None if self.ranks is None else self.ranks.allocator,
            micro_batches=args.gradient_accumulation_steps * processes if divides else 1,
        )
        self.adaptation.hooks.begin(run)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.adaptation.hooks.step_begins(state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self.adaptation.hooks.stepped(state.global_step, skipped=skipped)  # Trainer counts the step only later

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.adaptation.hooks.end()
