"""Jobs run on a Ray cluster: the extra pedyra[ray]. The only file that names Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pedyra.app.interrupts import on_interrupt
from pedyra.lab.compare.jobs import Job, Outcome, Stop, is_done, run_job
from pedyra.lab.compare.pool import Report

RETRIES = 5
"""How often Ray runs a job again whose worker died; each time it goes on from its checkpoint."""


ANSWER_SECONDS = 5.0
"""For a connection to the address. Ray's own attempts take a minute and more, also on a port that is closed."""


def check_ray_address(address: str, seconds: float = ANSWER_SECONDS) -> None:
    """Raise ValueError, naming the address, unless something accepts connections there.

    Args:
        address: host:port, ray://host:port; nothing is asked for "auto" and "local".
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--ray {address!r} is no address; it is host:port, ray://host:port, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except (OSError, UnicodeError) as error:  # a name that cannot be encoded
        flaw = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else error
        raise ValueError(
            f"--ray {address} does not answer ({flaw}); start Ray there, or give the address of its head node"
        ) from None


class RayPool:
    """One remote call per job, with one CPU and, in a cluster that has any, one GPU.

    Nodes find the comparison's folder under the same path as this process (a shared file system); where they do not,
    give every machine a `--shard` of its own and put the folders together with `--collect`.

    Args:
        address: host:port, ray://host:port, "auto" (the cluster of this machine) or "local" (one for this process).

    Raises:
        ImportError: Ray is not installed; with the line that installs it.
        ValueError: no cluster answers at the address.
    """

    def __init__(self, address: str) -> None:
        check_ray_address(address)
        try:
            import ray
        except ImportError:
            raise ImportError('--ray needs Ray; run: pip install "pedyra[ray]"') from None
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except ConnectionError as error:
            raise ValueError(f"--ray {address}: no Ray cluster answers there; {' '.join(str(error).split())}") from None
        self._ray = ray

    def run(self, jobs: Sequence[Job], report: Report) -> None:
        ray = self._ray
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

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        self._ray.shutdown()


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
