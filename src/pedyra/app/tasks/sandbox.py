"""A process that model-written code cannot leave: Linux namespaces, resource limits and a system call filter.

What runs inside sees the interpreter's own libraries, read-only, and an empty scratch folder in memory. It has no
network, no other process, no file of the machine, no environment, no open file but those it is handed, no rights, and
bounded time, memory, processes and files. When it ends or its time is up, all that it started and wrote is gone.

What this does not promise:
- Nothing holds against a hole in the kernel: the code runs on the kernel of the machine. For code that someone wrote
  to break out, use a virtual machine.
- `memory` holds for one process. All together can hold `processes` times as much, and `scratch` on top.
- The processor's caches and the clock are shared: what runs beside it can be timed.
- Where the system gives no namespaces (many containers, macOS, Windows) there is no sandbox: it refuses.
- It contains; it does not judge. `pedyra.app.tasks.code` says what makes a verdict hard to forge, and what does not.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pedyra.app.tasks import sandbox_child

_SPARE = 20.0
"""Seconds beyond the limit before the keeper itself is given up; it holds the clock, and setting up takes 0.1."""


class SandboxRefused(ValueError):
    """The sandbox cannot be set up here; one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the code may use. The defaults are enough for references of HumanEval(+) and MBPP(+), Mbpp/255 aside."""

    cpu_seconds: int = 10
    """Processor time, for each process."""
    seconds: float = 60.0
    """Wall clock, for all of it; a busy machine gives a program a part of a processor."""
    memory: int = 2 << 30
    """Bytes of address space, for each process."""
    processes: int = 8
    """Processes and threads at one time, the first included."""
    file_size: int = 16 << 20
    """Bytes in one file."""
    scratch: int = 64 << 20
    """Bytes in the scratch folder."""
    scratch_files: int = 1024
    """Files and folders in the scratch folder."""
    open_files: int = 64


class Sandbox:
    """Starts Python source in a process of its own, apart from the machine.

    packages: names of installed packages that the code may import beside the standard library.

    Making one runs an empty program, so that a machine without the means refuses before long work: SandboxRefused.
    """

    def __init__(self, limits: Limits | None = None, packages: Sequence[str] = ("numpy",)) -> None:
        if sys.platform != "linux":
            raise SandboxRefused(f"model-written code runs in Linux namespaces only, and this is {sys.platform}")
        if not sys.executable:
            raise SandboxRefused("model-written code needs a Python to start, and sys.executable is empty")
        self.limits = limits or Limits()
        self._plan = {**dataclasses.asdict(self.limits), **_view(packages)}
        if self.finish(self.start("print('ready')", piped=True)) != (True, b"ready\n"):
            raise SandboxRefused(
                f"model-written code cannot be run here: {sys.executable} does not start in the sandbox"
            )

    def start(
        self, source: str, *, keep: Sequence[int] = (), seconds: float | None = None, piped: bool = False
    ) -> subprocess.Popen[bytes]:
        """Run `source` as a program with the open files `keep`, at most `seconds` (default: limits.seconds).

        piped: stdin and stdout are those of `finish`, not /dev/null; for trusted programs, as stdout has no bound.
        `finish` must follow.
        """
        plan = {**self._plan, "source": source, "keep": list(keep), "seconds": seconds or self.limits.seconds}
        stream = subprocess.PIPE if piped else subprocess.DEVNULL
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox_child.__file__, json.dumps(plan)],
            stdin=stream,
            stdout=stream,
            stderr=subprocess.PIPE,
            pass_fds=keep,
            env={},
            cwd="/",
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[bytes], given: bytes | None = None) -> tuple[bool, bytes]:
        """Give the program its stdin and wait for its end: whether it came in time, and its stdout if it was piped.

        `process.terminate()` before this ends it at once. The process and all that it started are then gone.
        Raises SandboxRefused if it could not be set up.
        """
        try:
            output, refusal = process.communicate(given, timeout=self.limits.seconds + _SPARE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False, b""
        if refusal:  # nothing inside holds this stream, so nothing inside can refuse
            raise SandboxRefused(
                f"model-written code cannot be run here: {refusal.decode(errors='replace').strip().splitlines()[-1]}; "
                "it needs user namespaces (or root that may make others) and Linux 5.12 or newer"
            )
        return process.returncode != sandbox_child.TIMED_OUT, output or b""


def _view(packages: Sequence[str]) -> dict[str, Any]:
    """What of the machine is seen inside: `visible` (source, target), `links` to copy, `hidden` folders, `packages`."""
    libraries = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo"]
    libraries += [f"{prefix}/{name}" for prefix in {sys.base_prefix, sys.base_exec_prefix} for name in ("lib", "lib64")]
    libraries += ["/etc/ld.so.cache"]
    links = [path for path in libraries if os.path.islink(path)]
    seen = list(dict.fromkeys(path for path in libraries if os.path.exists(path) and path not in links))
    seen = [path for path in seen if not any(path.startswith(f"{other}/") for other in seen)]
    # Installed packages may hold the problems with their solutions.
    installed = ("site-packages", "dist-packages")
    hidden = [folder for path in seen for name in installed for folder in glob.glob(f"{path}/python*/{name}")]
    visible = [(path, path) for path in seen]
    for package in packages:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found else []:
            shared = f"{place}.libs"  # where a wheel keeps its shared libraries
            visible += [(place, f"/packages/{Path(place).name}")]
            visible += [(shared, f"/packages/{Path(shared).name}")] if os.path.isdir(shared) else []
    return {"visible": visible, "links": links, "hidden": hidden, "packages": "/packages"}
