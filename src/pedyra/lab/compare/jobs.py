"""The runs of a comparison: their folders, and how they are started, resumed and run side by side.

A job is one call of `pedyra train`, with a run folder of its own:

    <comparison>/jobs/<method>/<task>/r<budget>/lr<rate>/seed<seed>      reported; beside it .yaml and .log
    <comparison>/tuning/...       the same, for choosing the rate
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pedyra.app.interrupts import on_interrupt
from pedyra.app.runs.resume import why_not_resumable
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.yaml_file import to_yaml
from pedyra.lora.files import refuse_link, write_file
from pedyra.trainer.checkpoint_folder import last_complete_checkpoint

INTERRUPTED = 130
"""The exit code of `pedyra` after Ctrl-C."""
Purpose = Literal["jobs", "tuning"]


@dataclass(frozen=True, order=True)
class Entry:
    """One method on one task at one budget, for which a learning rate is chosen."""

    method: str
    task: str
    budget: int

    def __str__(self) -> str:
        return f"{self.method} on {self.task}, r = {self.budget}"


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    entry: Entry
    rate: float
    seed: int
    purpose: Purpose
    """Runs of `jobs` are reported, and those of `tuning` choose a rate."""
    folder: Path
    """The folder of the whole comparison."""
    recipe: dict[str, Any]

    @property
    def run(self) -> Path:
        method, task, budget = self.entry.method, self.entry.task, self.entry.budget
        return self.folder / self.purpose / method / task / f"r{budget}" / f"lr{self.rate:g}" / f"seed{self.seed}"

    @property
    def recipe_file(self) -> Path:
        return self.run.with_name(f"{self.run.name}.yaml")

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def final(self) -> dict[str, Any] | None:
        """Return the last line of the run's metrics; None for a run that has not come to its end."""
        return RunFolder(self.run).final

    @property
    def label(self) -> str:
        return f"{self.entry}, rate {self.rate:g}, {'' if self.purpose == 'jobs' else 'tuning '}seed {self.seed}"


@dataclass(frozen=True)
class JobEnd:
    """The end of a job."""

    job: Job
    status: Literal["done", "failed", "stopped"]
    message: str = ""
    """The reason of a failure, in one line."""


Stops = list[bool]
"""The list grows by one at each Ctrl-C or SIGTERM: at the first, runs save a checkpoint and end; a second kills
them."""


Engine = Callable[[Sequence[Job], Callable[[JobEnd], None], Stops], None]
"""Runs the jobs to their ends, on this machine or on a cluster, and begins none once there is a stop; the second
argument gets each end, one at a time."""


@dataclass(frozen=True)
class ThisMachine:
    """Runs are processes of this machine, `workers` at once, each with its share of the cores as threads."""

    workers: int = 1

    def __call__(self, jobs: Sequence[Job], report: Callable[[JobEnd], None], stops: Stops) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        # A thread only waits for its child process.
        with ThreadPoolExecutor(self.workers) as executor:
            pending = {executor.submit(run_job, job, partial(_in_a_child, threads, stops), stops) for job in jobs}
            while pending:
                # With a timeout, because a signal may wake another thread only.
                done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    if (end := future.result()) is not None:
                        report(end)


HERE = ThisMachine()


def run_jobs(jobs: Sequence[Job], report: Callable[[JobEnd], None], engine: Engine) -> None:
    """Run the jobs; one that fails does not stop the others. Ctrl-C, or SIGTERM to this process, ends in a
    KeyboardInterrupt once the running ones have ended."""
    stops: Stops = []
    with on_interrupt(lambda: stops.append(True), also=[signal.SIGTERM]):
        engine(jobs, report, stops)
    if stops:
        raise KeyboardInterrupt


def run_job(job: Job, start: Callable[[list[str], Path], int], stops: Stops) -> JobEnd | None:
    """Run a job to its end, from its last checkpoint if there is one; None if it did not begin. `start` runs `pedyra`
    with these arguments, appends its output to a log, and returns its exit code."""
    if stops:
        return None
    code = offset = 0
    try:
        for place in job.run.parents:
            if place == job.folder:  # the user's own, which may be a link
                break
            refuse_link(place)
        write_file(job.recipe_file, to_yaml(job.recipe))
        if job.final is None:
            offset = job.log.stat().st_size if job.log.is_file() else 0
            code = start(_arguments(job), job.log)
    except (OSError, ValueError) as error:  # no process, no disk, a link: the next job may have them
        return JobEnd(job, "failed", str(error))
    if job.final is not None:
        return JobEnd(job, "done")
    if stops or code == INTERRUPTED:
        return JobEnd(job, "stopped")
    return JobEnd(job, "failed", _reason(code, job.log, offset))


def _in_a_child(threads: int, stops: Stops, arguments: list[str], log: Path) -> int:
    """Run `pedyra` as a process of its own."""
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    command = [sys.executable, "-m", "pedyra", *arguments]
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    return _wait(child, stops)


def _arguments(job: Job) -> list[str]:
    """Return the arguments of pedyra that start or continue a job."""
    train = ["train", str(job.recipe_file)]
    if not (job.run / "recipe.yaml").is_file():
        return train
    return [*train, "--resume" if _may_resume(job) else "--overwrite"]


def _may_resume(job: Job) -> bool:
    """Tell whether the job can resume; one that cannot starts anew."""
    try:
        last_complete_checkpoint(job.run, with_ranks=(job.run / "ranks.jsonl").is_file())
    except ValueError:
        return False
    return why_not_resumable(job.recipe["method"]["name"], job.recipe.get("training", {})) is None


def _wait(child: subprocess.Popen[bytes], stops: Stops) -> int:
    """Wait for the exit code. Ctrl-C in the terminal reaches the comparison alone, which passes it on once."""
    interrupted = False
    while True:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if len(stops) == 1 and not interrupted:
                child.send_signal(signal.SIGINT)
                interrupted = True
            elif len(stops) > 1:
                child.kill()


def _reason(code: int, log: Path, offset: int) -> str:
    """Return the last line of a job's output since this byte of its log, and the place of the log."""
    text = log.read_bytes()[offset:].decode(errors="replace") if log.is_file() else ""  # killed before it had one
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last_line = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -9:  # SIGKILL, a name that Windows lacks
        ending += ", as where memory runs out"
    return f"{last_line} ({ending}; {log})"
