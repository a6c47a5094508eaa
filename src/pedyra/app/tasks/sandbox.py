"""Generated code runs in a process that bubblewrap isolates from the network and the machine.

The process has the interpreter, its libraries and numpy, read-only, and an empty /tmp: no network, no other process, no
file of the user, no environment. Processor time, wall clock and memory are bounded, and its children end with it.

The sandbox contains mistakes, such as an endless loop or a removal of files, but no exploit of the kernel: for that,
use a virtual machine. Code can forge its own verdict, because a solution and its tests share a process, as in the
harnesses of HumanEval and EvalPlus.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy

from pedyra.errors import UserError

_PACKAGES = "/packages"
"""The code finds numpy here, as the tests of EvalPlus do. Other packages are not seen: some hold the solutions."""
_DONE = 97  # the process ends with this code behind the last part, which an early exit does not reach
_OUT_OF_TIME = 128 + 24  # bubblewrap ends so where SIGXCPU has ended the process

_INSIDE = """
import json, os, resource, sys, types
plan = json.load(sys.stdin)
for name, most in plan["limits"].items():
    resource.setrlimit(getattr(resource, name), (most, most + 1))  # SIGXCPU comes a second before SIGKILL
sys.path.append(plan["packages"])
if hasattr(sys, "set_int_max_str_digits"):
    sys.set_int_max_str_digits(0)
module = types.ModuleType("solution")
sys.modules["solution"] = module  # dataclasses and pickle look a class's module up
for part in plan["parts"]:
    exec(compile(part, "<solution>", "exec"), vars(module))
os._exit(plan["done"])
"""
"""The program inside limits itself, and then runs the parts one after the other in one module."""


CPU_SECONDS, MEMORY = 10, 2 << 30
"""Processor time and address space (bytes) of each process. The references of HumanEval(+) and MBPP(+) need less, but
for Mbpp/255."""
SECONDS = 60.0  # of the wall clock, as a busy machine gives a program a part of a processor


class Sandbox:
    """Runs Python source apart from the machine; one that lacks the means is refused when this is made."""

    def __init__(self) -> None:
        bubblewrap = shutil.which("bwrap") if sys.platform == "linux" else None
        if bubblewrap is None:
            raise UserError(
                f"model-written code runs in bubblewrap, on Linux: this is {sys.platform}, and bwrap is not on the "
                f"PATH; run apt install bubblewrap (dnf install bubblewrap)"
            )
        self._command = [bubblewrap, *_view(), str(Path(sys.executable).resolve()), "-I", "-S", "-B", "-c", _INSIDE]
        trial = self._run([], stderr=subprocess.PIPE)
        if trial.returncode != _DONE:
            lines = trial.stderr.decode(errors="replace").strip().splitlines() or ["it does not start"]
            raise UserError(
                f"model-written code cannot be run here: {lines[-1]}; bubblewrap needs user namespaces, which a "
                f"container or the kernel may forbid"
            )

    def run(self, parts: Sequence[str]) -> Literal["passed", "failed", "timeout"]:
        """Run the sources one after the other in one module; "passed" says that the last of them came to its end."""
        try:
            code = self._run(parts).returncode
        except subprocess.TimeoutExpired:
            return "timeout"
        return "passed" if code == _DONE else "timeout" if code == _OUT_OF_TIME else "failed"

    def _run(self, parts: Sequence[str], stderr: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
        limits = {"RLIMIT_CPU": CPU_SECONDS, "RLIMIT_AS": MEMORY, "RLIMIT_CORE": 0}
        plan = {"limits": limits, "packages": _PACKAGES, "done": _DONE, "parts": list(parts)}
        text = json.dumps(plan).encode()
        return subprocess.run(self._command, input=text, stdout=subprocess.DEVNULL, stderr=stderr, timeout=SECONDS)


def _view() -> Iterator[str]:
    """Yield what the program sees of the machine, as arguments of bubblewrap."""
    yield from ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--uid", "65534", "--gid", "65534")
    for name, value in {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}.items():
        yield from ("--setenv", name, value)
    libraries = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.base_exec_prefix]
    for path in dict.fromkeys(libraries):
        yield from ("--ro-bind-try", path, path)
    numpy_folder = Path(numpy.__file__).parent
    for folder in (numpy_folder, numpy_folder.with_name("numpy.libs")):  # where a wheel keeps its shared libraries
        yield from ("--ro-bind-try", str(folder), f"{_PACKAGES}/{folder.name}")
    yield from ("--dev", "/dev", "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp")
