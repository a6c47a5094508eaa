"""Ctrl-C during training: finish the step, save a checkpoint, stop. A second Ctrl-C aborts at once."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import TrainerCallback

from pedyra.app.interrupts import on_interrupt
from pedyra.app.runs.processes import any_of_all


class StopOnInterrupt(TrainerCallback):
    """While entered as a context, the first SIGINT asks Trainer to save and stop after the current step.

    `requested` tells afterwards whether that happened. Outside the main thread, where Python allows no signal
    handler, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopOnInterrupt:
        self._listening: AbstractContextManager[None] = on_interrupt(self._request)
        self._listening.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.__exit__(None, None, None)

    def _request(self) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = any_of_all(self.requested)  # processes that stop after different steps would wait for ever
        if self.requested:
            control.should_save = True  # after an evaluation that is due: a resume would never make up for it
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        # Trainer ends the epoch on its way out. If it is not over, the checkpoint that is written already is all.
        over = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self.requested and not over:
            control.should_save = control.should_evaluate = control.should_log = False
        elif self.requested and control.should_evaluate:
            control.should_save = True
        return control
