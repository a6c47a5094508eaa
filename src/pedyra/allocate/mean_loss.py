"""A model whose loss is a mean over its own rows, in a Trainer that takes it for a part of a mean over all tokens.

Trainer hands `num_items_in_batch` to every model whose forward takes any keyword, and then no longer divides the loss
by the micro-batches of a step, and multiplies it by the processes: right where the model has divided a sum by that
number. Classifiers (BERT's, say) ignore it. Their loss would count once for every micro-batch and process, and a
penalty beside it would weigh the less.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

logger = logging.getLogger(__name__)

ITEMS = "num_items_in_batch"


class _Watched(Tensor):
    """A number that knows whether anything was computed from it."""

    used = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # of its device or shape, as checkpointing asks
            for each in args:
                if isinstance(each, cls):
                    each.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def is_ignored(items: Any) -> bool:
    """Whether the model that was given this number of items is seen not to have used it."""
    return isinstance(items, _Watched) and not items.used


def expect_mean_loss(trainer: Trainer, model: nn.Module) -> None:
    """At the model's next forward with labels: have Trainer treat a loss that ignores `num_items_in_batch` as a mean.

    A step's gradient is then the mean over micro-batches and processes, whatever their number. A model that is
    compiled is left as it is.
    """
    if not trainer.model_accepts_loss_kwargs or trainer.args.torch_compile:
        return
    _FirstForward(trainer, model)


class _FirstForward:
    """The hooks, until they have judged; those of a copy of the model, or of a pickle (for workers that load data), do
    nothing."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.trainer: Trainer | None = trainer
        self.hooks = [
            model.register_forward_pre_hook(self.watch, with_kwargs=True),
            model.register_forward_hook(self.judge, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"trainer": None, "hooks": []}

    def watch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        number = kwargs.get(ITEMS)
        if self.trainer is not None and isinstance(number, Tensor) and kwargs.get("labels") is not None:
            kwargs = {**kwargs, ITEMS: number.as_subclass(_Watched)}
        return args, kwargs

    def judge(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        number, trainer = kwargs.get(ITEMS), self.trainer
        if trainer is None or not isinstance(number, _Watched):
            return
        for hook in self.hooks:
            hook.remove()
        if not is_ignored(number):
            return
        trainer.model_accepts_loss_kwargs = False
        times = trainer.args.gradient_accumulation_steps * trainer.args.world_size
        if times > 1 and trainer.is_world_process_zero():
            logger.warning(
                "the model's loss does not depend on %s: it is a mean, and is averaged over micro-batches and "
                "processes. By itself Trainer would multiply it by up to %d",
                ITEMS,
                times,
            )
