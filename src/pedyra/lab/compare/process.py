"""How a run's process starts: anew, or as a fork of one process that has imported the libraries.

Importing torch, transformers and peft takes some seconds of a core, which is more than a short run itself takes, and
a comparison starts hundreds of runs.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Protocol

PRELOADED = ["pedyra.lab.compare.preload", "pedyra.app.runs.run", "pedyra.app.report", "pedyra.lab.cli"]
"""What `python -m pedyra train` imports, after the module that keeps a Ctrl-C from ending the process meanwhile."""


class Child(Protocol):
    """What a job needs of its process; subprocess.Popen has it."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal if one ended it. Raises subprocess.TimeoutExpired."""
        ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


class Start(Protocol):
    """Starts `python -m pedyra ARGUMENTS`, in a session of its own, that writes to the log and holds the lock."""

    def __call__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Child: ...


def start_anew(arguments: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> Child:
    """A new interpreter."""
    command = [sys.executable, "-m", "pedyra", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, env=dict(environment), pass_fds=(lock,), start_new_session=True
        )


def can_fork() -> bool:
    """Whether a fork that computes is safe: on Linux, without an accelerator, whose driver does not survive a fork."""
    import torch

    return sys.platform == "linux" and not torch.accelerator.is_available()


class Forked:
    """A run in a fork of the process that has imported the libraries. Starts like `start_anew`, but in a moment."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        given = (list(arguments), str(log.absolute()), dict(environment), _Descriptor(lock))
        self._process = context.Process(target=_run, args=given)
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("pedyra", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        if self._process.pid is not None and self._process.exitcode is None:
            os.kill(self._process.pid, sig)

    def kill(self) -> None:
        self._process.kill()


class _Descriptor:
    """A file descriptor that goes along to the child, open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._descriptor),)


def _received(descriptor: Any) -> int:
    return descriptor.detach()


def _run(arguments: list[str], log: str, environment: dict[str, str], lock: int) -> None:
    """In the child. `lock` stays open until it ends."""
    import torch

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["pedyra", *arguments]

    runpy.run_module("pedyra", run_name="__main__")
