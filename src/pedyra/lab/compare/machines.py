"""Where the runs of a comparison are: on this machine, or on a Ray cluster (the extra pedyra[ray]; only here)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pedyra.app.interrupts import on_interrupt
from pedyra.lab.compare.jobs import Job, Outcome, Report, RunJobs, Stop, is_done, run_here, run_job

RETRIES = 5
"""How often Ray runs a job again whose worker died; each time it goes on from its checkpoint."""
ANSWER_SECONDS = 5.0
"""For a connection to the address. Ray's own attempts take a minute and more, also on a port that is closed."""


@dataclass(frozen=True)
class Machines:
    """What runs the jobs. A script that uses this has `if __name__ == "__main__":`.

    Raises:
        ValueError: no worker.
    """

    workers: int = 1
    """Processes at once on this machine; without `ray`."""
    ray: str | None = None
    """Address of a Ray cluster: host:port, ray://host:port, "auto" (this machine's) or "local" (for this process)."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; it is at least 1")

    def check(self) -> None:
        """Raise ValueError, naming the address, unless something accepts connections at that of Ray."""
        if self.ray in (None, "auto", "local"):
            return
        host, _, port = self.ray.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--ray {self.ray!r} is no address; it is host:port, ray://host:port, auto or local")
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, UnicodeError) as error:  # a name that cannot be encoded
            flaw = f"no answer within {ANSWER_SECONDS:g} s" if isinstance(error, TimeoutError) else error
            raise ValueError(
                f"--ray {self.ray} does not answer ({flaw}); start Ray there, or give the address of its head node"
            ) from None

    @contextmanager
    def runner(self) -> Iterator[RunJobs]:
        """What runs jobs, while entered.

        On a cluster a job is one remote call, with one CPU and, where there is any, one GPU. Its nodes find the
        comparison's folder under the same path as this process (a shared file system).

        Raises:
            ImportError: Ray is not installed; with the line that installs it.
            ValueError: no cluster answers at the address.
        """
        if self.ray is None:
            yield partial(run_here, workers=self.workers)
            return
        self.check()
        try:
            import ray
        except ImportError:
            raise ImportError('--ray needs Ray; run in a checkout: pip install ".[ray]"') from None
        dashboard = False if self.ray == "local" else None
        try:
            ray.init(address=self.ray, log_to_driver=False, include_dashboard=dashboard)
        except ConnectionError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"--ray {self.ray}: no Ray cluster answers there; {said}") from None
        try:
            yield partial(_run_on_ray, ray)
        finally:
            ray.shutdown()  # leaves the cluster; a local one ends


def _run_on_ray(ray: Any, jobs: Sequence[Job], report: Report) -> None:
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_work)
    running: dict[Any, Job] = {remote.remote(job, os.getcwd()): job for job in jobs}
    stop = Stop()
    with on_interrupt(stop.raise_level):
        while running and not stop.level:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
            for ref in finished:
                report(_outcome(ray, ref, running.pop(ref)))
    if stop.level:
        for ref in running:
            ray.cancel(ref)  # a KeyboardInterrupt in the worker, on which the run saves a checkpoint
        for ref, job in running.items():
            report(_outcome(ray, ref, job))
        raise KeyboardInterrupt


def _work(job: Job, directory: str) -> Outcome:
    if not Path(directory, job.folder).is_dir():
        raise FileNotFoundError(
            f"node {socket.gethostname()} does not see {Path(directory, job.folder)}; share the folder"
        )
    os.chdir(directory)
    return run_job(job, threads=1)


def _outcome(ray: Any, ref: Any, job: Job) -> Outcome:
    """How a job ended. A worker that died more often than Ray retries, or a node that lacks a file, is a failure."""
    try:
        return ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return Outcome(job, "done" if is_done(job) else "stopped")
    except ray.exceptions.RayTaskError as error:
        return Outcome(job, "failed", " ".join(str(error.cause).split()))
    except ray.exceptions.RayError as error:
        return Outcome(job, "failed", " ".join(str(error).split()))
