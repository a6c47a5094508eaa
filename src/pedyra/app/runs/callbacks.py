"""A run adds three things to its Trainer: the log in metrics.jsonl, the progress on the screen, and Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from transformers import ProgressCallback, TrainerCallback

from pedyra.app.runs.processes import any_of_all
from pedyra.lora.files import append_row, json_line, read_rows, sync_file, write_file
from pedyra.trainer.adapt import MethodTraining

PLAIN_LINES = 20  # lines a whole run prints when stdout is no terminal, beside one per evaluation


class MetricsLog(TrainerCallback):
    """Appends `{"step", "epoch", "seconds", ...}` to metrics.jsonl at each log, from the step of the checkpoint on that
    the run resumes from; where another process `writes`, it only measures the time."""

    def __init__(self, path: Path, resumed_step: int = 0, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        rows = read_rows(path, {"step": int, "seconds": (float, None)})
        earlier = [row for row in rows if row["step"] <= resumed_step]
        # Without Trainer's summary of a run that was stopped.
        rows = [row for row in earlier if "train_loss" not in row]
        if writes:
            write_file(path, "".join(map(json_line, rows)))
        self._seconds_before = max((row.get("seconds") or 0.0 for row in earlier), default=0.0)
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of training so far, evaluations included, over all resumes."""
        return self._seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self._seconds_before, self._started = self.seconds, None

    def write_side_files(self, folder: Path) -> None:
        """Flush the rows of the run to the disk (fsync) before the checkpoint in `folder`."""
        for name in ("metrics.jsonl", "ranks.jsonl"):
            sync_file(self.path.with_name(name))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.writes:
            return
        rest = {key: value for key, value in (logs or {}).items() if key not in ("step", "epoch")}
        append_row(
            self.path, {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 3), **rest}
        )


class TrainingProgress(TrainerCallback):
    """Shows step, loss, held-out metric, total rank and last adjustment, in plain lines where there is no terminal."""

    handle: MethodTraining | None = None  # None for a plain LoRA
    total_rank = 0  # at the start

    def __init__(self, console: Console, metric: str) -> None:
        self.console, self.metric = console, metric
        self._values: dict[str, float] = {}  # the last ones of the log
        self._next_line = 0.0

    def status(self) -> str:
        parts = [f"{name} {value:.4f}" for name, value in self._values.items()]
        allocator = self.handle.allocator if self.handle else None
        parts.append(f"rank {sum(allocator.ranks.values()) if allocator else self.total_rank}")
        if allocator and allocator.history:
            last = allocator.history[-1]
            counts = {"pruned": len(last["pruned"]), "added": sum(last["added"].values())}
            moves = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
            parts.append(f"adjusted at {last['step']}" + (f" ({moves})" if moves else ""))
        return "  ".join(parts)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs, step = logs or {}, state.global_step
        if "train_loss" in logs:
            return  # Trainer's summary of the whole training
        for name, key in (("loss", "loss"), (self.metric, f"eval_{self.metric}")):
            if key in logs:
                self._values[name] = logs[key]
        # Where an evaluation follows, its line has the loss too.
        due = "eval_loss" in logs or (step >= self._next_line and not control.should_evaluate)
        if due and not self.console.is_terminal:
            self.console.print(f"step {step}/{state.max_steps}  {self.status()}", soft_wrap=True)
            self._next_line = step + state.max_steps / PLAIN_LINES


class TrainingBar(ProgressCallback):
    """Shows Trainer's progress bar with the status behind it, and not the logs."""

    def __init__(self, progress: TrainingProgress) -> None:
        super().__init__()
        self.progress = progress

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(self.progress.status())


class StopOnInterrupt(TrainerCallback):
    """At the first `request` (Ctrl-C) Trainer saves and stops after the current step; a second one aborts at once."""

    def __init__(self) -> None:
        self.has_request = False

    def request(self) -> None:
        if self.has_request:
            raise KeyboardInterrupt
        self.has_request = True

    def on_step_end(self, args, state, control, **kwargs):
        # All processes stop after the same step, or they would wait for each other.
        self.has_request = any_of_all(self.has_request)
        if self.has_request:
            control.should_save = True  # after an evaluation that is due, which a resume would skip
            control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        if self.has_request:  # or Trainer would at last remove this checkpoint with all but the best
            args.save_total_limit = None

    def on_epoch_end(self, args, state, control, **kwargs):
        # Trainer ends the epoch when it stops; in the middle of one, the checkpoint has been written already.
        over = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self.has_request and not over:
            control.should_save = control.should_evaluate = control.should_log = False
