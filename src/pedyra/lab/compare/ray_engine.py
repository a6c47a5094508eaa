"""Runs of a comparison are trained on a Ray cluster by `--ray ADDRESS`.

Ray decides where a run is trained and when, and begins it again elsewhere when its node dies. All nodes see the folder
of the comparison, as Ray's own trainings ask for, so that a run goes on from its last checkpoint wherever it begins.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from platform import node
from typing import Any

import pedyra
from pedyra.errors import UserError
from pedyra.lab.compare.jobs import INTERRUPTED, Job, JobEnd, Stops, run_job


class RayCluster:
    """Each run is a task of Ray, which takes these GPUs (None: one where the cluster has any) and CPUs, and begins so
    many times again when its node or process has died. Raises ValueError: nothing answers at the address."""

    def __init__(self, address: str, *, gpus: float | None = None, cpus: float = 1.0, retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('--ray needs Ray; run in a checkout: pip install ".[ray]"') from error
        self.ray: Any = ray
        if address not in ("auto", "local") and not address.startswith("ray://"):
            raise UserError(f"--ray is {address!r}; it is auto, ray://HOST:PORT or local")
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its words about a time-out are said below
                ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--ray {address}: no cluster answers ({reason}); start one with ray start --head, or give --ray local"
            ) from None
        of_all = ray.cluster_resources()
        gpus = float(of_all.get("GPU", 0) > 0) if gpus is None else gpus
        self.takes = {"num_gpus": gpus, "num_cpus": cpus, "max_retries": retries}
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.summary = f"{len(nodes)} nodes with {of_all.get('GPU', 0):g} GPUs; a run takes {gpus:g}"

    def __call__(self, jobs: Sequence[Job], report: Callable[[JobEnd], None], stops: Stops) -> None:
        # A process trains once: then its memory, and that of its GPU, is free.
        task = self.ray.remote(max_calls=1, **self.takes)(_on_a_node)
        running = {task.remote(job, os.getcwd(), pedyra.__version__): job for job in jobs}
        num_stops = 0
        while running:
            for stop in range(num_stops, len(stops)):
                for each in running:
                    self.ray.cancel(each, force=stop > 0)
            num_stops = len(stops)
            for each in self.ray.wait(list(running), timeout=1.0)[0]:
                if (end := self._end_of(each, running.pop(each), stops)) is not None:
                    report(end)

    def _end_of(self, task: Any, job: Job, stops: Stops) -> JobEnd | None:
        try:
            return self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            return None
        except self.ray.exceptions.RayError as error:
            if stops:  # killed by a second Ctrl-C
                return JobEnd(job, "stopped")
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return JobEnd(job, "failed", f"{lines[-1] if 'Traceback' in str(error) else lines[0]} ({job.log})")


def _on_a_node(job: Job, root: str, version: str) -> JobEnd | None:
    """Run a job in this process, which Ray has started on some node; its paths are from `root` on. It fails where the
    node has another version of pedyra, or does not see the folder."""
    if version != pedyra.__version__:
        return JobEnd(job, "failed", f"{node()} has pedyra {pedyra.__version__}; install pedyra[cli] {version} there")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path(root).is_dir():  # an absolute folder may be seen where the command's own is not
        os.chdir(root)
    if not job.folder.is_dir():
        message = f"{node()} does not see {job.folder}; give an output_dir on storage that all nodes see"
        return JobEnd(job, "failed", message)
    return run_job(job, _in_this_process, [])


def _in_this_process(arguments: list[str], log: Path) -> int:
    """Run `pedyra` here, where Ray's signals reach it and it ends with Ray's process."""
    from pedyra.app.cli import main

    with log.open("a", buffering=1) as out, redirect_stdout(out), redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            return 1
    return 0
