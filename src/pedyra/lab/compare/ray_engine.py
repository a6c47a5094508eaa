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
from typing import Any
from uuid import uuid4

import pedyra
from pedyra.errors import UserError
from pedyra.lab.compare.jobs import INTERRUPTED, Job, JobEnd, Stops, run_job


class RayCluster:
    """Each run is a task of Ray.

    Args:
        address: of a cluster (`auto`, `ray://HOST:PORT`), or `local`, which starts one on this machine.
        gpus, cpus: what one run takes; gpus None: one where the cluster has any, else none.
        retries: how often a run begins again whose node or process has died.

    Raises:
        ImportError: Ray is not installed.
        ValueError: nothing answers at the address. When runs begin: a node has no pedyra, or another version, or does
            not see the folder of the comparison.
    """

    def __init__(self, address: str, *, gpus: float | None = None, cpus: float = 1.0, retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('--ray needs Ray; run in a checkout: pip install ".[ray]"') from error
        self.ray: Any = ray
        if address not in ("auto", "local") and not address.startswith("ray://"):
            raise UserError(f"--ray is {address!r}; it is auto, ray://HOST:PORT or local")
        more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its words about a time-out are said below
                ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR, **more)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--ray {address}: no cluster answers ({reason}); start one with ray start --head, or give --ray local"
            ) from None
        of_all = ray.cluster_resources()
        gpus = float(of_all.get("GPU", 0) > 0) if gpus is None else gpus
        self.takes = {"num_gpus": gpus, "num_cpus": cpus, "max_retries": retries}
        self.summary = f"{len(self._nodes())} nodes with {of_all.get('GPU', 0):g} GPUs; a run takes {gpus:g}"
        if not self._nodes():
            self.summary = f"no node has {gpus:g} GPUs and {cpus:g} CPUs now; runs wait for one that has"

    def __call__(self, jobs: Sequence[Job], report: Callable[[JobEnd], None], stops: Stops) -> None:
        if not jobs:
            return
        self._check_nodes(jobs[0].folder)
        # A process trains once: then its memory, and that of its GPU, is free.
        task = self.ray.remote(max_calls=1, **self.takes)(_on_a_node)
        running = {task.remote(job, os.getcwd()): job for job in jobs}
        forwarded = 0
        while running:
            for stop in range(forwarded, len(stops)):
                for each in running:
                    self.ray.cancel(each, force=stop > 0)
            forwarded = len(stops)
            for each in self.ray.wait(list(running), timeout=1.0)[0]:
                if (end := self._end_of(each, running.pop(each), stops)) is not None:
                    report(end)

    def _nodes(self) -> list[str]:
        """Return the nodes that could train a run."""
        needs = {"GPU": self.takes["num_gpus"], "CPU": self.takes["num_cpus"]}
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        return [
            node["NodeID"]
            for node in alive
            if all(node["Resources"].get(key, 0) >= need for key, need in needs.items())
        ]

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

    def _check_nodes(self, folder: Path) -> None:
        """Refuse, before any run begins, a node that has no pedyra, or another version, or does not see this folder."""

        def look(file: Path) -> tuple[str, str | None, bool]:  # inside a function, it travels as code
            import platform

            try:
                import pedyra
                import pedyra.app.cli

                version = pedyra.__version__
            except ImportError:
                version = None
            return platform.node(), version, file.is_file()

        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mark = folder / f".seen-{uuid4().hex}"
        mark.touch()
        try:
            looks = [
                self.ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(look)
                for node in self._nodes()
            ]
            answers = self.ray.get([each.remote(mark.absolute()) for each in looks])
        finally:
            mark.unlink()
        for name, version, is_visible in answers:
            if version != pedyra.__version__:
                has = "no pedyra[cli]" if version is None else f"pedyra {version}"
                raise UserError(f"node {name} has {has}; install pedyra[cli] {pedyra.__version__} there")
            if not is_visible:
                raise UserError(f"node {name} does not see {folder}; give an output_dir on storage that all nodes see")


def _on_a_node(job: Job, root: str) -> JobEnd | None:
    """Run a job in this process, which Ray has started for it on some node; its paths are from `root` on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path(root).is_dir():  # an absolute folder may be seen where the command's own is not
        os.chdir(root)
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
