"""What Trainer does not hand to its callbacks, taken from the frames that are calling them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

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


def _frames_of(kind: type) -> Iterator[FrameType]:
    """The frames of methods of objects of this kind, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame
        frame = frame.f_back
