"""Optimizer steps of a run, and that the calls around each of them come in turn."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class StepCount:
    """Steps taken so far, of `total`; between `begin` and `end` the gradients of one more have been read."""

    def __init__(self, total: int) -> None:
        self.total, self.taken = total, 0
        self._read = 0
        """The last step whose gradients were read."""

    def begin(self) -> int:
        """The gradients of the next step are read; its number.

        Raises:
            ValueError: they have been read already.
        """
        step = self.taken + 1
        if self._read == step:
            raise ValueError(
                f"before_step() was called twice in step {step}; call after_step() after each optimizer.step()"
            )
        self._read = step
        return step

    def skip(self) -> None:
        """The gradients since the last step are thrown away; ValueError where they have been read already."""
        if self._read > self.taken:
            raise ValueError(
                f"skip_step() after before_step() in step {self._read}, which has read the gradients; decide before it"
            )

    def end(self) -> int:
        """The step is taken; its number. A run of more than `total` is told once; ValueError without `begin`."""
        self.taken += 1
        if self._read != self.taken:
            raise ValueError(
                f"after_step() without before_step() in step {self.taken}; call before_step() once the gradients are "
                f"complete and before optimizer.step()"
            )
        if self.taken == self.total + 1:
            logger.warning(
                "step %d of a run of %d: before_step() and after_step() belong to each optimizer.step(), not to each "
                "micro-batch, and total_steps counts those",
                self.taken,
                self.total,
            )
        return self.taken
