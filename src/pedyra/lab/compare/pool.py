"""Jobs run side by side on this machine."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from pedyra.app.interrupts import on_interrupt
from pedyra.lab.compare.jobs import Job, Outcome, Stop, run_job
from pedyra.lab.compare.process import Start, start_anew

Report = Callable[[Outcome], None]
"""Called, one at a time, when a job has ended."""


class Pool(Protocol):
    """Runs jobs, in any order and anywhere."""

    def run(self, jobs: Sequence[Job], report: Report) -> None:
        """Run every job to its end; one that fails does not stop the others. Raises KeyboardInterrupt after Ctrl-C."""
        ...


class LocalPool:
    """So many processes at once, each with its share of the cores as threads.

    Ctrl-C, or SIGTERM to this process, lets every running job save a checkpoint and end; a second one kills them.

    Args:
        start: how a job's process is started.
    """

    def __init__(self, workers: int = 1, start: Start = start_anew) -> None:
        if workers < 1:
            raise ValueError(f"--workers is {workers}; it is at least 1")
        self.workers = workers
        self._start = start

    def run(self, jobs: Sequence[Job], report: Report) -> None:
        stop = Stop()
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        waiting, running = deque(jobs), set[Future[Outcome]]()
        # A thread only waits for its child process.
        with on_interrupt(stop.raise_level, also=[signal.SIGTERM]), ThreadPoolExecutor(self.workers) as executor:
            while running or (waiting and not stop.level):
                while waiting and len(running) < self.workers and not stop.level:
                    running.add(executor.submit(self._run, waiting.popleft(), threads, stop))
                running = _report_finished(running, report)
        if stop.level:
            raise KeyboardInterrupt

    def _run(self, job: Job, threads: int, stop: Stop) -> Outcome:
        try:
            return run_job(job, threads, stop, self._start)
        except OSError as error:  # no process, no disk: of this job, perhaps not of the next
            return Outcome(job, "failed", str(error))


def _report_finished(running: set[Future[Outcome]], report: Report) -> set[Future[Outcome]]:
    done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)  # a signal may wake another thread only
    for future in done:
        report(future.result())
    return running
