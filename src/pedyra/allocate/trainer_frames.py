"""What Trainer does not hand to its callbacks: from the frames that are calling them, and when an exception ends it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from pedyra.allocate.rank_allocator import RankAllocator

Caller = TypeVar("Caller")


def caller(kind: type[Caller]) -> Caller | None:
    """The nearest object of this kind whose method is running."""
    return next((frame.f_locals["self"] for frame in _frames_of(kind)), None)


def resumed_from() -> Path | None:
    """The checkpoint that the running `Trainer.train` has loaded; None if it loaded none."""
    given = (frame.f_locals.get("resume_from_checkpoint") for frame in _frames_of(Trainer))
    return next((Path(folder) for folder in given if isinstance(folder, (str, Path))), None)


def go_first(callback: TrainerCallback) -> None:
    """Move `callback` before Trainer's reporters, so that they get its numbers together with the loss.

    Second instances of the reporters would open runs of their own (TensorBoard, DVCLive), and Trainer hands a
    callback everything but the handler that is calling it. Moving an entry to the front while the handler iterates
    over the list neither skips nor repeats another one.
    """
    handler = caller(CallbackHandler)
    if handler is not None:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def release_at_error(trainer: Trainer) -> None:
    """Have the allocators of its callbacks released, and what they hold of a step, where an exception ends an epoch."""
    original = trainer._run_epoch
    if "_run_epoch" in vars(trainer):  # done by an earlier training
        return

    def run_epoch(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:  # Ctrl-C in a notebook, say
            for made in (getattr(callback, "allocator", None) for callback in trainer.callback_handler.callbacks):
                if isinstance(made, RankAllocator):
                    made.release()
            raise

    trainer._run_epoch = run_epoch


def _frames_of(kind: type) -> Iterator[FrameType]:
    """The frames of methods of objects of this kind, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame
        frame = frame.f_back
