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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pedyra.app.interrupts import on_interrupt
from pedyra.app.yaml_file import to_yaml
from pedyra.fitting.cut import RECORD
from pedyra.lora.files import check_shape, read_rows, refuse_link, write_file
from pedyra.methods.registry import get_method
from pedyra.trainer.checkpoint_folder import last_complete_checkpoint

POLL_SECONDS = 0.5
Purpose = Literal["jobs", "tuning"]


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
    def run(self) -> Path:
        """Its folder."""
        method, task, budget = self.entry.method, self.entry.task, self.entry.budget
        return self.folder / self.purpose / method / task / f"r{budget}" / f"lr{self.rate:g}" / f"seed{self.seed}"

    @property
    def recipe_file(self) -> Path:
        return self.run.with_name(f"{self.run.name}.yaml")

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.entry}, rate {self.rate:g}, {'' if self.purpose == 'jobs' else 'tuning '}seed {self.seed}"


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    job: Job
    status: Literal["done", "failed", "stopped"]
    message: str = ""
    """Why it failed, one line."""


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
    """Whether the run has come to its end, and to that of the fit that its recipe asks for."""
    return final_row(job.run) is not None and (job.recipe.get("fit") is None or (job.run / "fit" / RECORD).is_file())


def run_jobs(jobs: Sequence[Job], report: Callable[[JobEnd], None], workers: int = 1) -> None:
    """Run so many jobs at once as processes of this machine, each with its share of the cores as threads.

    One that fails does not stop the others. Ctrl-C, or SIGTERM to this process, lets every running job save a
    checkpoint and end; a second one kills them.

    Args:
        report: called, one at a time, when a job has ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    stops: list[bool] = []  # one for each signal: after the first jobs save a checkpoint and end, after another at once
    threads = max(1, (os.cpu_count() or 1) // workers)
    # A thread only waits for its child process.
    with on_interrupt(lambda: stops.append(True), also=[signal.SIGTERM]), ThreadPoolExecutor(workers) as executor:
        pending = {executor.submit(_run, job, threads, stops) for job in jobs}
        while pending:
            # Not for ever: a signal may wake another thread only.
            done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                if (end := future.result()) is not None:
                    report(end)
    if stops:
        raise KeyboardInterrupt


def _run(job: Job, threads: int, stops: list[bool]) -> JobEnd | None:
    """Run a job to its end in a child process, from its last checkpoint if there is one; None if it did not begin."""
    if stops:
        return None
    code = begins = 0
    try:
        for place in job.run.parents:
            if place == job.folder:  # which the user chose, and may be a link
                break
            refuse_link(place)
        job.run.parent.mkdir(parents=True, exist_ok=True)
        write_file(job.recipe_file, to_yaml(job.recipe))
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        for arguments in _attempts(job):
            if stops or (arguments[-1] == "--overwrite" and (final_row(job.run) is not None or _may_resume(job))):
                break
            command = [sys.executable, "-m", "pedyra", *arguments]
            said_before = job.log.read_bytes() if job.log.is_file() else b""
            begins = len(said_before)
            # A file of its own: the child of a comparison that was killed may still write into the one that was here.
            write_file(job.log, said_before)
            with job.log.open("ab") as out:
                child = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            code = _wait(child, stops)
            if code != 2:
                break
    except (OSError, ValueError) as error:  # no process, no disk, a link: of this job, perhaps not of the next
        return JobEnd(job, "failed", str(error))
    if is_done(job):
        return JobEnd(job, "done")
    return JobEnd(job, "stopped") if stops else JobEnd(job, "failed", _reason(code, job.log, begins))


def _attempts(job: Job) -> list[list[str]]:
    """Arguments of pedyra that bring a job to its end, of which the next follows where one is refused."""
    train = ["train", str(job.recipe_file)]
    if is_done(job):
        return []
    if final_row(job.run) is not None:  # it was trained, and its fit failed or was stopped
        return [["fit", "--overwrite", str(job.run), *_fit_options(job.recipe["fit"])]]
    return [[*train, "--resume"], [*train, "--overwrite"]] if (job.run / "recipe.yaml").is_file() else [train]


def _fit_options(section: Mapping[str, Any]) -> list[str]:
    """The section `fit` of a recipe as options of `pedyra fit`."""
    options = []
    for key, value in section.items():
        if value is None or value is False or value == []:  # 0 is a value
            continue
        options.append(f"--{key.replace('_', '-')}")
        if value is not True:
            options.append(",".join(value) if isinstance(value, list) else str(value))
    return options


def _may_resume(job: Job) -> bool:
    """Whether a later call can go on where this job was stopped. One that cannot starts anew; what was refused for a
    reason that passes (a full disk, another process that trains it) keeps its checkpoint."""
    grouped = job.recipe.get("training", {}).get("train_sampling_strategy") == "group_by_length"
    try:
        last_complete_checkpoint(job.run, with_ranks=(job.run / "ranks.jsonl").is_file())
    except ValueError:
        return False
    return get_method(job.recipe["method"]).resumable and not grouped


def _wait(child: subprocess.Popen[bytes], stops: list[bool]) -> int:
    """The exit code. A Ctrl-C in the terminal reaches the comparison alone, which then tells its children once."""
    told = False
    while True:
        try:
            return child.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if len(stops) == 1 and not told:
                child.send_signal(signal.SIGINT)
                told = True
            elif len(stops) > 1:
                child.kill()


def _reason(code: int, log: Path, begins: int) -> str:
    """The last thing a failed job said in its last attempt, whose lines begin at this byte, and where it says more."""
    text = log.read_bytes()[begins:].decode(errors="replace") if log.is_file() else ""  # killed before it had one
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("Error: ") if lines else "it said nothing"
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == -9:  # SIGKILL, a name that Windows lacks
        ended += ", as where memory runs out"
    return f"{said} ({ended}; {log})"
