"""Ctrl-C during training: finish the step, save a checkpoint, stop. A second Ctrl-C aborts at once."""

from __future__ import annotations

import signal
import threading

from transformers import TrainerCallback


class StopOnInterrupt(TrainerCallback):
    """While entered as a context, the first SIGINT asks Trainer to save and stop after the current step.

    `requested` tells afterwards whether that happened. Outside the main thread, where Python allows no signal
    handler, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        # Trainer ends the epoch on its way out; the checkpoint is written already, and the epoch is not over.
        if self.requested:
            control.should_save = control.should_evaluate = control.should_log = False
        return control
