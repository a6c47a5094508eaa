"""Runs of a comparison are trained on a Ray cluster by `--ray ADDRESS`.

Ray decides where a run is trained and when, and begins it again elsewhere when its node dies. What stands here is how
a run comes to a node and back. Where all nodes see the comparison's folder, a run works in it. Where they do not, its
rows travel with it, and a keeper beside the command holds what the run folder had at its last checkpoint.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pedyra
from pedyra.errors import UserError
from pedyra.lab.compare.jobs import INTERRUPTED, Job, JobEnd, Stops, run_job
from pedyra.trainer.checkpoint_folder import list_checkpoints

CARRY_SECONDS = 5.0
"""A run that is carried is asked for a new checkpoint so often."""


class RayCluster:
    """Each run is a task of Ray.

    Args:
        address: of a cluster (`auto`, `ray://HOST:PORT`), or `local`, which starts one on this machine.
        gpus, cpus: what one run takes; gpus None: one where the cluster has any, else none.
        retries: how often a run begins again whose node or process has died.

    Raises:
        ImportError: Ray is not installed.
        ValueError: nothing answers at the address. When runs begin: a node has no pedyra, or another version, or does
            not see a folder that cannot be carried.
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
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--ray {address}: no cluster answers ({told}); start one with ray start --head, or give --ray local"
            ) from None
        of_all = ray.cluster_resources()
        gpus = float(of_all.get("GPU", 0) > 0) if gpus is None else gpus
        self.takes = {"num_gpus": gpus, "num_cpus": cpus, "max_retries": retries}
        self.told = f"{len(self._nodes())} nodes with {of_all.get('GPU', 0):g} GPUs; a run takes {gpus:g}"
        if not self._nodes():
            self.told = f"no node has {gpus:g} GPUs and {cpus:g} CPUs now; runs wait for one that has"

    def __call__(self, jobs: Sequence[Job], report: Callable[[JobEnd], None], stops: Stops) -> None:
        if not jobs:
            return
        keeper = None if self._is_seen(jobs[0].folder) else self._keeper()
        # A process trains once: then its memory, and that of its GPU, is free.
        task = self.ray.remote(max_calls=1, **self.takes)(_on_a_node)
        rows = {}  # each task's once, however many runs it has
        running = {}
        for job in jobs:
            if keeper is not None:
                if job.entry.task not in rows:
                    rows[job.entry.task] = self.ray.put(packed([job.folder / "data" / job.entry.task]))
                self.ray.get(keeper.put.remote(job.label, packed(_files(job))))
            running[task.remote(job, os.getcwd(), keeper, rows.get(job.entry.task))] = job
        told = 0
        while running:
            for again in range(told, len(stops)):
                for each in running:
                    self.ray.cancel(each, force=again > 0)
            told = len(stops)
            for each in self.ray.wait(list(running), timeout=1.0)[0]:
                job = running.pop(each)
                end = self._end_of(each, job, stops)
                if keeper is not None:
                    content = self.ray.get(keeper.take.remote(job.label))
                    shutil.rmtree(job.run, ignore_errors=True)  # it was sent along: what came back has taken its place
                    unpack(content)
                if end is not None:
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

    def _is_seen(self, folder: Path) -> bool:
        """Tell whether all nodes see this folder, before any run begins. Refuse a node that does not where it cannot be
        carried, or that has no pedyra, or another version."""

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
            asked = [
                self.ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))(look)
                for node in self._nodes()
            ]
            found = self.ray.get([each.remote(mark.absolute()) for each in asked])
        finally:
            mark.unlink()
        for name, version, seen in found:
            if version != pedyra.__version__:
                has = "no pedyra[cli]" if version is None else f"pedyra {version}"
                raise UserError(f"node {name} has {has}; install pedyra[cli] {pedyra.__version__} there")
            if not seen and folder.is_absolute():
                raise UserError(
                    f"{folder} is not seen by {name}; give an output_dir on storage that all nodes see, or a relative "
                    f"path, which is carried to the nodes and back"
                )
        return all(seen for _, _, seen in found)

    def _keeper(self) -> Any:
        """Start, on the node of this command, what keeps of each run its folder as it was at the last checkpoint."""

        class Keeper:  # inside a function, it travels as code, and its process loads no torch
            def __init__(self) -> None:
                self.kept: dict[str, bytes] = {}

            def put(self, label: str, content: bytes) -> None:
                self.kept[label] = content

            def get(self, label: str) -> bytes:
                return self.kept[label]

            def take(self, label: str) -> bytes:
                return self.kept.pop(label)

        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        return self.ray.remote(num_cpus=0, scheduling_strategy=here)(Keeper).remote()


def _on_a_node(job: Job, root: str, keeper: Any, rows: bytes | None) -> JobEnd | None:
    """Run a job in this process, which Ray has started for it on some node; what is given of files is a path from
    `root` on, or, with a keeper, from a folder of this node's own on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if keeper is None or rows is None:
        if Path(root).is_dir():  # an absolute folder may be seen where the command's own is not
            os.chdir(root)
        return run_job(job, _in_this_process, [])
    with tempfile.TemporaryDirectory() as own:
        os.chdir(own)
        import ray

        unpack(rows)
        unpack(ray.get(keeper.get.remote(job.label)))
        try:
            with _carried(job, lambda: ray.get(keeper.put.remote(job.label, packed(_files(job))))):
                return run_job(job, _in_this_process, [])
        finally:
            os.chdir(root if Path(root).is_dir() else "/")


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


def _files(job: Job) -> list[Path]:
    return [job.run, job.recipe_file, job.log]


@contextmanager
def _carried(job: Job, carry: Callable[[], None]) -> Iterator[None]:
    """While entered, call `carry` after each new checkpoint, and once more at the end."""
    ended = threading.Event()

    def watch() -> None:
        known: list[Path] = []
        while not ended.wait(CARRY_SECONDS):
            found = list_checkpoints(job.run)
            if found != known:
                with suppress(OSError):  # a file that was removed meanwhile; the next time then
                    carry()
                    known = found

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        carry()


def packed(paths: Iterable[Path]) -> bytes:
    """Return those of the files and folders that are there as a tar, by their relative paths."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in paths:
            if path.exists():
                tar.add(path)
    return out.getvalue()


def unpack(content: bytes) -> None:
    """Write the files of `packed` at their paths, from the working directory on."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(filter="data")
