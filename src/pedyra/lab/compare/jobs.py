"""The runs of a comparison: what each trains, where it writes, how far it came, and how it is run.

A job is one process, `pedyra train`, with a run folder of its own:

    <comparison>/jobs/<method>/<task>/r<budget>/lr<rate>/seed<seed>      reported; beside it .yaml, .log and .lock
    <comparison>/tuning/...       the same, for choosing the rate
    <comparison>/timing/...       the same, for matching the time
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pedyra.app.yaml_file import to_yaml
from pedyra.lab.compare.process import Child, Start, start_anew
from pedyra.lora.files import check_shape, read_rows, write_file

POLL_SECONDS = 0.5
Purpose = Literal["jobs", "tuning", "timing"]
Status = Literal["done", "failed", "stopped"]


@dataclass(frozen=True, order=True)
class Entry:
    """What is compared: one method on one task at one budget. A learning rate is chosen for each."""

    method: str
    task: str
    budget: int


@dataclass(frozen=True)
class Job:
    """One run."""

    entry: Entry
    rate: float
    seed: int
    purpose: Purpose
    """jobs: it is reported."""
    folder: Path
    """Of the comparison."""
    recipe: dict[str, Any]

    @property
    def place(self) -> Path:
        """The run folder, relative to the comparison's."""
        entry = self.entry
        return Path(self.purpose, entry.method, entry.task, f"r{entry.budget}", f"lr{self.rate:g}", f"seed{self.seed}")

    @property
    def run(self) -> Path:
        return self.folder / self.place

    @property
    def label(self) -> str:
        """For messages."""
        kind = "" if self.purpose == "jobs" else f"{self.purpose} "
        entry = f"{self.entry.method} on {self.entry.task}, r = {self.entry.budget}"
        return f"{entry}, rate {self.rate:g}, {kind}seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    status: Status
    message: str = ""
    """Why it failed, one line."""


class Stop:
    """Tells running jobs to end: `level` 0 to go on, 1 to save a checkpoint and end, 2 to end at once."""

    def __init__(self) -> None:
        self.level = 0

    def raise_level(self) -> None:
        self.level = min(self.level + 1, 2)


_FINAL = {
    **{"metric": str, "value": (float, None), "eval_loss": (float, None)},
    **{"trainable_parameters": int, "seconds": float, "peak_memory_bytes": int},
}


def final_row(run: Path) -> dict[str, Any] | None:
    """The last line of a finished run's metrics; None for a run that has not come to its end."""
    metrics = run / "metrics.jsonl"
    rows = read_rows(metrics, {"step": int})
    if not rows or not rows[-1].get("final"):
        return None
    check_shape(rows[-1], _FINAL, f"{metrics}, its last line")
    return rows[-1]


def is_done(job: Job) -> bool:
    return final_row(job.run) is not None


def run_job(job: Job, threads: int, stop: Stop | None = None, start: Start = start_anew) -> Outcome:
    """Run a job to its end in a child process, from its last checkpoint if there is one.

    Args:
        threads: OMP_NUM_THREADS of the child, unless the environment sets it.
        stop: raise its level to end the child, with the outcome `stopped`.
        start: how the child is started.
    """
    if is_done(job):
        return Outcome(job, "done")
    job.run.parent.mkdir(parents=True, exist_ok=True)
    recipe = _beside(job.run, ".yaml")
    write_file(recipe, to_yaml(job.recipe))
    command = ["train", str(recipe)]
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    code = 0
    with _locked(_beside(job.run, ".lock"), stop) as lock:
        if not is_done(job):
            # What cannot be resumed (exit code 2: no whole checkpoint, a method that cannot) starts anew.
            attempts = [["--resume"], ["--overwrite"]] if (job.run / "recipe.yaml").is_file() else [[]]
            for flags in attempts:
                if stop is not None and stop.level:
                    break
                code = _wait(start([*command, *flags], _beside(job.run, ".log"), environment, lock), stop)
                if code != 2:
                    break
    if stop is not None and stop.level and not is_done(job):
        return Outcome(job, "stopped")
    if is_done(job):
        return Outcome(job, "done")
    return Outcome(job, "failed", _reason(code, _beside(job.run, ".log")))


def _wait(child: Child, stop: Stop | None) -> int:
    """The exit code. A Ctrl-C in the terminal reaches the comparison alone, which then tells its children once."""
    told = False
    try:
        while True:
            try:
                return child.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if stop is not None and stop.level == 1 and not told:
                    child.send_signal(signal.SIGINT)
                    told = True
                elif stop is not None and stop.level == 2:
                    child.kill()
    except KeyboardInterrupt:  # where the job itself is interrupted, as Ray does
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


@contextmanager
def _locked(path: Path, stop: Stop | None) -> Iterator[int]:
    """An exclusive lock. The child inherits it, and so keeps it if its parent is killed.

    Whoever comes next waits for that child, whose work is not lost, instead of writing into the same folder.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not (stop is not None and stop.level):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _beside(run: Path, suffix: str) -> Path:
    return run.with_name(run.name + suffix)


def _reason(code: int, log: Path) -> str:
    """The last thing a failed job said, and where it says more."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""  # killed before it had one
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        ended += ", as where memory runs out"
    return f"{said} ({ended}; {log})"
