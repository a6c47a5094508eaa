"""What one sees while a run trains: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from pedyra.allocate.callback import RankCallback

PLAIN_LINES = 20  # lines a whole run prints when stdout is no terminal, beside one per evaluation


class TrainingProgress(TrainerCallback):
    """Step, loss, held-out metric, total rank and last adjustment. Enter it around `trainer.train()`.

    Args:
        console: where to draw; a bar if it is a terminal, else plain lines.
        metric: name of the task's metric, as Trainer logs it after `eval_`.
        total_rank: the sum of all ranks at the start.
        ranks: what adapts the ranks, and knows their sum and the last adjustment; None if they stay.
    """

    def __init__(self, console: Console, metric: str, total_rank: int, ranks: RankCallback | None) -> None:
        self.console = console
        self.metric = metric
        self._total_rank = total_rank
        self._ranks = ranks
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
        allocator = self._ranks.allocator if self._ranks else None
        parts.append(f"rank {sum(allocator.ranks.values()) if allocator else self._total_rank}")
        if allocator and allocator.history:
            last = allocator.history[-1]
            moved = f"adjusted at {last['step']} ({sum(last['added'].values())} moved)"
            parts.append(f"{last['fit']['state']}, {last['fit']['share']:.0%} left" if "fit" in last else moved)
        return "  ".join(parts)

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar.reset(self._task, total=state.max_steps, completed=state.global_step, status=self.status())

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(self._task, completed=state.global_step, status=self.status())

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "train_loss" in logs:
            return  # Trainer's summary, which says nothing new
        self._loss = logs.get("loss", self._loss)
        self._value = logs.get(f"eval_{self.metric}", self._value)
        self._bar.update(self._task, status=self.status())
        if not self.console.is_terminal and self._is_due(state, logs, evaluation_follows=control.should_evaluate):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self.status()}", soft_wrap=True)
            self._next_line = state.global_step + state.max_steps / PLAIN_LINES

    def _is_due(self, state, logs, *, evaluation_follows: bool) -> bool:
        if "eval_loss" in logs:
            return True
        return state.global_step >= self._next_line and not evaluation_follows  # one line tells both

    def on_prediction_step(self, args, state, control, **kwargs):
        self._evaluated_batches += 1
        self._bar.update(self._task, description="eval", status=f"batch {self._evaluated_batches}")

    def on_evaluate(self, args, state, control, **kwargs):
        self._evaluated_batches = 0
        self._bar.update(self._task, description="train", status=self.status())
