"""Jobs run side by side on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from pedyra.experiments.jobs import Job, Outcome, Stop, run_job
from pedyra.experiments.launch import Start, start_anew

Report = Callable[[Outcome], None]
"""Called, one at a time, when a job has ended."""


class Pool(Protocol):
    """Runs jobs, in any order and anywhere."""

    def run(self, jobs: Sequence[Job], report: Report) -> None:
        """Run every job to its end; one that fails does not stop the others. Raises KeyboardInterrupt after Ctrl-C."""
        ...


class LocalPool:
    """So many processes at once, each with its share of the cores as threads.

    Ctrl-C lets every running job save a checkpoint and end; a second one kills them.

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
        # A thread only waits for its child process.
        with ThreadPoolExecutor(self.workers) as executor:
            pending = {executor.submit(run_job, job, threads, stop, self._start) for job in jobs}
            try:
                while pending:
                    pending = _report_finished(pending, report)
            except KeyboardInterrupt:
                stop.level = 1
                running = {future for future in pending if not future.cancel()}
                try:
                    while running:
                        running = _report_finished(running, report)
                except KeyboardInterrupt:
                    stop.level = 2
                raise


def _report_finished(pending: set[Future[Outcome]], report: Report) -> set[Future[Outcome]]:
    done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
    for future in done:
        report(future.result())
    return pending
