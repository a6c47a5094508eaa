"""`adapt` changes this in the Trainer that it is given, each for its reason.

- `watch_training`: the folder that a resume loads is handed on, and an exception (Ctrl-C in a notebook) ends with the
  hooks taken off the model.
- `end_at_last_step`: a training that is resumed at its last step takes none more. Trainer by itself takes one, with
  ranks that the schedule has no place for.
- `expect_mean_loss`: a model whose loss is a mean over its own rows is treated as one, so that PE-DyRA's penalty and
  scores weigh the same in 1, 2 and 4 processes and at any accumulation. It cannot be done by scaling the penalty alone,
  since Trainer clips the gradient of the multiplied loss before any callback sees it.
- `checkpoints.save_whole`: checkpoints appear whole or not at all, because a torn side file loses the run; one at the
  end of an epoch is written after the evaluation that is due there.
- `engines.keep_whole`: under FSDP2 what is trained stays whole, so that ranks can move.
- The handle stands before the reporters among the callbacks, so that they get its numbers together with the loss.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

logger = logging.getLogger(__name__)


def put_around(owner: Any, name: str, around: Callable[..., Any], *given: Any) -> None:
    """Have a method's calls go through `around(original, *given, *args, **kwargs)`."""
    original = getattr(owner, name)
    if getattr(original, "func", None) is not around:  # a model_init, which is called again, has done so
        setattr(owner, name, functools.partial(around, original, *given))


def watch_training(trainer: Trainer, began: Callable[[Path | None], None], failed: Callable[[], None]) -> None:
    """Have `began` called as a training begins, with the checkpoint that it goes on from (None: it begins anew), and
    `failed` where an exception ends it."""
    loop: Any = trainer._inner_training_loop
    vars(trainer)["_inner_training_loop"] = functools.partial(_training, loop, began, failed)


def _training(
    original: Callable[..., Any], began: Callable[..., None], failed: Callable[[], None], *args: Any, **kwargs: Any
) -> Any:
    folder = kwargs.get("resume_from_checkpoint")
    began(None if folder is None else Path(folder))
    try:
        return original(*args, **kwargs)
    except BaseException:  # Ctrl-C in a notebook, say
        failed()
        raise


def end_at_last_step(trainer: Trainer) -> None:
    """Have a training that is resumed at its last step take none more; inside an epoch Trainer by itself takes one."""
    put_around(trainer, "get_batch_samples", _batches, trainer)


def _batches(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    return ([], None) if trainer.state.global_step >= trainer.state.max_steps else original(*args, **kwargs)


@contextmanager
def replaced(trainer: Trainer, name: str, method: Any) -> Iterator[None]:
    before = trainer.__dict__.get(name)
    setattr(trainer, name, method)
    try:
        yield
    finally:
        delattr(trainer, name)
        if before is not None:
            setattr(trainer, name, before)


ITEMS = "num_items_in_batch"


class _Watched(Tensor):
    """A number knows whether anything was computed from it."""

    used = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # checkpointing asks for its device or shape
            for each in args:
                if isinstance(each, cls):
                    each.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def expect_mean_loss(trainer: Trainer, model: nn.Module) -> FirstForward | None:
    """Have Trainer treat a loss that ignores `num_items_in_batch` as a mean, from the next forward with labels on.

    A step's gradient is then the mean over micro-batches and processes, whatever their number. A model that is
    compiled is left as it is, with a warning, and so is a Trainer that computes the loss itself, which knows what it
    divides by. Returns what to `remove` from the model when training ends.
    """
    if not trainer.model_accepts_loss_kwargs:
        return None
    if trainer.args.torch_compile:
        if trainer.args.gradient_accumulation_steps * trainer.args.world_size > 1:
            logger.warning(
                "the model is compiled, so it cannot be seen whether its loss is a mean of its own, which Trainer "
                "adds up over micro-batches and processes; if it is (a BERT classifier's is), set "
                "trainer.model_accepts_loss_kwargs = False before train()"
            )
        return None
    return FirstForward(trainer, model)


class FirstForward:
    """Hooks look at the first forward with labels, and are gone when they have judged it. Those of a copy of the model,
    or of a pickle (for workers that load data), do nothing."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.trainer: Trainer | None = trainer
        self.hooks = [
            model.register_forward_pre_hook(self.watch, with_kwargs=True),
            model.register_forward_hook(self.judge, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"trainer": None, "hooks": []}

    def remove(self) -> None:
        """Take the hooks off the model. Where a Trainer computes the loss itself and gives the model no labels, they
        never judge, and would stay."""
        for hook in self.hooks:
            hook.remove()
        self.trainer, self.hooks = None, []

    def watch(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        number = kwargs.get(ITEMS)
        if self.trainer is not None and isinstance(number, Tensor) and kwargs.get("labels") is not None:
            kwargs = {**kwargs, ITEMS: number.as_subclass(_Watched)}
        return args, kwargs

    def judge(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        number, trainer = kwargs.get(ITEMS), self.trainer
        if trainer is None or not isinstance(number, _Watched):
            return
        self.remove()
        if number.used:
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
