"""The runs of a comparison: what each trains, where it writes, and how they run side by side on this machine.

A job is one process, `pedyra train`, with a run folder of its own:

    <comparison>/jobs/<method>/<task>/r<budget>/lr<rate>/seed<seed>      reported; beside it .yaml and .log
    <comparison>/tuning/...       the same, for choosing the rate
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pedyra.app.interrupts import on_interrupt
from pedyra.app.yaml_file import to_yaml
from pedyra.lora.files import check_shape, read_rows, write_file

POLL_SECONDS = 0.5
Purpose = Literal["jobs", "tuning"]
Status = Literal["done", "failed", "stopped"]


@dataclass(frozen=True, order=True)
class Entry:
    """What is compared: one method on one task at one budget. A learning rate is chosen for each."""

    method: str
    task: str
    budget: int

    def __str__(self) -> str:
        return f"{self.method} on {self.task}, r = {self.budget}"


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
        return f"{self.entry}, rate {self.rate:g}, {'' if self.purpose == 'jobs' else 'tuning '}seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    status: Status
    message: str = ""
    """Why it failed, one line."""


Report = Callable[[Outcome], None]
"""Called, one at a time, when a job has ended."""
RunJobs = Callable[[Sequence[Job], Report], None]
"""Runs every job to its end, in any order and anywhere; one that fails does not stop the others."""


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


def run_here(jobs: Sequence[Job], report: Report, workers: int = 1) -> None:
    """Run so many jobs at once as processes of this machine, each with its share of the cores as threads.

    Ctrl-C, or SIGTERM to this process, lets every running job save a checkpoint and end; a second one kills them.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    stop = Stop()
    threads = max(1, (os.cpu_count() or 1) // workers)
    waiting, running = deque(jobs), set[Future[Outcome]]()
    # A thread only waits for its child process.
    with on_interrupt(stop.raise_level, also=[signal.SIGTERM]), ThreadPoolExecutor(workers) as executor:
        while running or (waiting and not stop.level):
            while waiting and len(running) < workers and not stop.level:
                running.add(executor.submit(run_job, waiting.popleft(), threads, stop))
            # Not for ever: a signal may wake another thread only.
            done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                report(future.result())
    if stop.level:
        raise KeyboardInterrupt


def run_job(job: Job, threads: int, stop: Stop | None = None) -> Outcome:
    """Run a job to its end in a child process, from its last checkpoint if there is one.

    Args:
        threads: OMP_NUM_THREADS of the child, unless the environment sets it.
        stop: raise its level to end the child, with the outcome `stopped`.
    """
    stop = stop or Stop()
    log = _beside(job.run, ".log")
    try:
        job.run.parent.mkdir(parents=True, exist_ok=True)
        recipe = _beside(job.run, ".yaml")
        write_file(recipe, to_yaml(job.recipe))
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        # What cannot be resumed (exit code 2: no whole checkpoint, a method that cannot) starts anew.
        code = 0
        for flags in [["--resume"], ["--overwrite"]] if (job.run / "recipe.yaml").is_file() else [[]]:
            if stop.level or is_done(job):
                break
            command = [sys.executable, "-m", "pedyra", "train", str(recipe), *flags]
            with log.open("ab") as out:
                child = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            code = _wait(child, stop)
            if code != 2:
                break
    except OSError as error:  # no process, no disk: of this job, perhaps not of the next
        return Outcome(job, "failed", str(error))
    if is_done(job):
        return Outcome(job, "done")
    return Outcome(job, "stopped") if stop.level else Outcome(job, "failed", _reason(code, log))


def _wait(child: subprocess.Popen[bytes], stop: Stop) -> int:
    """The exit code. A Ctrl-C in the terminal reaches the comparison alone, which then tells its children once."""
    told = False
    try:
        while True:
            try:
                return child.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if stop.level == 1 and not told:
                    child.send_signal(signal.SIGINT)
                    told = True
                elif stop.level == 2:
                    child.kill()
    except KeyboardInterrupt:  # where the job itself is interrupted, as Ray does
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


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
