"""`adapt` changes this in the Trainer that it is given, each for its reason.

- `MethodTraining.training`: a resume's folder is noted, and an exception (Ctrl-C) ends with the hooks taken off.
- `end_at_last_step`: a training that is resumed at its last step takes none more, which the schedule has no place for.
- `MethodTraining.first_batches`: the first micro-batches are seen, so that the number of labels can be said.
- `checkpoints.save_whole`: checkpoints appear whole or not at all, because a torn side file loses the run; one at the
  end of an epoch is written after the evaluation that is due there.
- `engines.keep_whole`: under FSDP2 what is trained stays whole, so that ranks can move.
- The handle stands before the reporters among the callbacks, so that they get its numbers together with the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer


def put_around(owner: Any, name: str, around: Callable[..., Any], *arguments: Any) -> None:
    """Have a method's calls go through `around(original, *arguments, *args, **kwargs)`."""
    original = getattr(owner, name)
    if getattr(original, "func", None) is not around:  # a model_init, which is called again, has done so
        vars(owner)[name] = functools.partial(around, original, *arguments)


def end_at_last_step(trainer: Trainer) -> None:
    """Have a training that is resumed at its last step take none more; inside an epoch Trainer by itself takes one."""
    put_around(trainer, "get_batch_samples", _batches, trainer)


def _batches(original: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    return ([], None) if trainer.state.global_step >= trainer.state.max_steps else original(*args, **kwargs)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, `owner` has this value of its own."""
    before = dict(vars(owner))
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if name in before:
            setattr(owner, name, before[name])
