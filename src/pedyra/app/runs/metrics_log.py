"""metrics.jsonl: one line per log of Trainer, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import time
from pathlib import Path

from transformers import TrainerCallback

from pedyra.lora.files import append_row, json_line, read_rows, write_file


class MetricsLog(TrainerCallback):
    """Appends `{"step", "epoch", "seconds", ...}` to `path` at each log; `seconds` counts training, over all resumes.

    Args:
        path: the metrics.jsonl to append to.
        resumed_step: step of the checkpoint the run continues from; later lines are dropped. 0 starts anew.
        writes: False: another process writes the file, and this one only takes the time.
    """

    def __init__(self, path: Path, resumed_step: int = 0, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        known = read_rows(path, {"step": int, "seconds": (float, None)})
        rows = [row for row in known if row["step"] <= resumed_step and "train_loss" not in row]
        if writes:
            write_file(path, "".join(map(json_line, rows)))
        self._resumed_step = self._last_step = resumed_step
        self._seconds_before = (rows[-1].get("seconds") or 0.0) if rows else 0.0
        self._seconds_here = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of training so far, evaluations included, over all resumes."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds_before + self._seconds_here + running

    @property
    def steps_per_second(self) -> float:
        """Optimizer steps a second since training was last started."""
        seconds = self.seconds - self._seconds_before
        return (self._last_step - self._resumed_step) / seconds if seconds > 0 else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._last_step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self._seconds_here, self._started = self.seconds - self._seconds_before, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.writes:
            return
        rest = {key: value for key, value in (logs or {}).items() if key not in ("step", "epoch")}
        append_row(
            self.path, {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 3), **rest}
        )
