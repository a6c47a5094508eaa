"""A fit leaves the Trainer, what it holds, its model and all random states as they were."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pedyra.fitting.modes import checkpointing, evaluating, frozen, use_averaged


@contextmanager
def untouched(trainer: Any, model: Any) -> Iterator[None]:
    """Restore at the end the Trainer and what it holds, the modes and gradients of the model, and random states."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        owners = (trainer, trainer.args, trainer.state, trainer.control, trainer.callback_handler, trainer.accelerator)
        for owner in owners:
            stack.callback(_restorer(vars(owner)))
        stack.enter_context(frozen(model))
        stack.enter_context(checkpointing(model, trainer.args))
        stack.enter_context(evaluating(model))
        use_averaged(trainer.optimizer)
        args = trainer.args
        if getattr(args, "predict_with_generate", False) and not hasattr(trainer, "_gen_kwargs"):
            # Its own evaluate() sets this, which may never have run.
            settings = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
            trainer._gen_kwargs = {name: value for name, value in settings.items() if value is not None}
        # Each process's loss is the mean over its own batch, whose samples are counted; on one device.
        vars(args)["average_tokens_across_devices"] = False
        # A loss of the user's own may log, as it does at steps, and the trackers of the training would get it.
        vars(trainer)["log"] = lambda *_, **__: None
        # A training sets it, which may have been in another process; TRL divides a router's loss by it.
        vars(trainer)["current_gradient_accumulation_steps"] = 1
        if args.n_gpu > 1:
            vars(args)["_n_gpu"] = 1
        yield


_LARGE = ("train_dataset", "eval_dataset")
"""Attributes whose contents are left alone."""


def _restorer(value: Any) -> Callable[[], object]:
    """Return a function that restores the contents of a container, those inside too, or of a small tensor."""
    if isinstance(value, dict | list | deque | set):
        content = dict(value) if isinstance(value, dict) else list(value)
        items = content.items() if isinstance(content, dict) else enumerate(content)
        inner = [_restorer(each) for name, each in items if name not in _LARGE]

        def restore() -> None:
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(content)
            for each in inner:
                each()

        return restore
    if type(value) is Tensor and value.numel() <= 1024:
        saved = value.detach().clone()
        return lambda: None if torch.equal(value, saved) else value.detach().copy_(saved)
    return lambda: None
