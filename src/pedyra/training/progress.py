"""What one sees while a run trains: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

PLAIN_LINES = 20  # lines a whole run prints when stdout is no terminal, beside one per evaluation


class TrainingProgress(TrainerCallback):
    """Step, loss, held-out metric, total rank and last adjustment. Enter it around `trainer.train()`.

    Args:
        console: where to draw; a bar if it is a terminal, else plain lines.
        metric: name of the task's metric, as Trainer logs it after `eval_`.
        total_rank: the sum of all ranks now.
        last_adjustment: the newest adjustment record, or None before the first.
    """

    def __init__(
        self,
        console: Console,
        metric: str,
        total_rank: Callable[[], int],
        last_adjustment: Callable[[], dict | None],
    ) -> None:
        self.console = console
        self.metric = metric
        self._total_rank = total_rank
        self._last_adjustment = last_adjustment
        self._loss: float | None = None
        self._value: float | None = None
        self._next_line = 0.0
        self._evaluated_batches = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=None, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def status(self) -> str:
        """One line: loss, metric, total rank, last adjustment; each once it is known."""
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._value is not None:
            parts.append(f"{self.metric} {self._value:.4f}")
        parts.append(f"rank {self._total_rank()}")
        adjustment = self._last_adjustment()
        if adjustment is not None:
            moved = sum(adjustment["added"].values())
            parts.append(f"adjusted at {adjustment['step']} ({moved} moved)")
        return "  ".join(parts)

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar.reset(self._task, total=state.max_steps, completed=state.global_step, status=self.status())

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(self._task, completed=state.global_step, status=self.status())

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self._loss = logs.get("loss", self._loss)
        self._value = logs.get(f"eval_{self.metric}", self._value)
        self._bar.update(self._task, status=self.status())
        if not self.console.is_terminal and (state.global_step >= self._next_line or "eval_loss" in logs):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self.status()}", soft_wrap=True)
            self._next_line = state.global_step + state.max_steps / PLAIN_LINES

    def on_prediction_step(self, args, state, control, **kwargs):
        self._evaluated_batches += 1
        self._bar.update(self._task, description="eval", status=f"batch {self._evaluated_batches}")

    def on_evaluate(self, args, state, control, **kwargs):
        self._evaluated_batches = 0
        self._bar.update(self._task, description="train", status=self.status())
