"""`adapt` changes this in the Trainer that it is given, each for its reason.

- `watch_training`: the folder that a resume loads is handed on, and an exception (Ctrl-C in a notebook) ends with the
  hooks taken off the model.
- `end_at_last_step`: a training that is resumed at its last step takes none more. Trainer by itself takes one, with
  ranks that the schedule has no place for.
- `watch_batches`: the micro-batches of the first step are seen, so that the number of labels can be said.
- `checkpoints.save_whole`: checkpoints appear whole or not at all, because a torn side file loses the run; one at the
  end of an epoch is written after the evaluation that is due there.
- `engines.keep_whole`: under FSDP2 what is trained stays whole, so that ranks can move.
- The handle stands before the reporters among the callbacks, so that they get its numbers together with the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer


def put_around(owner: Any, name: str, around: Callable[..., Any], *arguments: Any) -> None:
    """Have a method's calls go through `around(original, *given, *args, **kwargs)`."""
    original = getattr(owner, name)
    if getattr(original, "func", None) is not around:  # a model_init, which is called again, has done so
        setattr(owner, name, functools.partial(around, original, *arguments))


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


def watch_batches(trainer: Trainer, look: Callable[[list[Any]], None]) -> None:
    """Have `look` get the micro-batches of each step before Trainer does."""
    put_around(trainer, "get_batch_samples", _seen, look)


def _seen(original: Callable[..., Any], look: Callable[[list[Any]], None], *args: Any, **kwargs: Any) -> Any:
    samples, items = original(*args, **kwargs)
    look(samples)
    return samples, items


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
