"""Model-written code cannot leave its process: bubblewrap's namespaces, a system call filter and limits hold it.

It sees the interpreter's own libraries, read-only, and nothing else: no network, no other process, no
file of the machine and no place to write one, no environment, no open file but those it is handed, no rights, and
bounded time, memory and processes. When it ends or its time is up, all that it started is gone.

What this does not promise:
- Nothing holds against a hole in the kernel: the code runs on the kernel of the machine. For code that someone wrote
  to break out, use a virtual machine.
- `memory` holds for one process. All together can hold `processes` times as much.
- The processor's caches and the clock are shared: what runs beside it can be timed.
- Where the system gives no namespaces (many containers, macOS, Windows) there is no sandbox: it refuses.
- It contains; it does not judge. `pedyra.app.tasks.code` says what makes a verdict hard to forge, and what does not.
"""

from __future__ import annotations

import errno
import glob
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pedyra.errors import UserError

INSTALL = "apt install bubblewrap libseccomp2 (dnf install bubblewrap libseccomp)"
PACKAGES = "/packages"
"""Installed packages are seen here inside."""
IMPORTABLE = ("numpy",)
"""The code may import these installed packages beside the standard library."""

_NOBODY = "65534"
_OUT_OF_TIME = 128 + signal.SIGXCPU if sys.platform == "linux" else None
"""bubblewrap reports so a program whose processor time was up."""
_DENIED = (
    *("ptrace", "process_vm_readv", "process_vm_writev"),  # other processes' memory
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen"),
    *("mount_setattr", "open_by_handle_at", "fanotify_init"),
    *("shmget", "shmat", "msgget", "semget", "memfd_create", "memfd_secret"),  # memory that no limit counts
    *("socket", "bpf", "userfaultfd", "perf_event_open", "io_uring_setup", "keyctl", "add_key", "request_key"),
)
"""A solution has no use for these system calls, which reach past its limits or into parts of the kernel with a history
of holes."""
_NEW_USER_NAMESPACE = 0x10000000  # linux/sched.h, CLONE_NEWUSER

_INSIDE = """
import json, os, resource, sys
plan = json.loads(sys.argv.pop())
if plan["user"]:
    os.setgroups([])
    os.setresgid(*[plan["user"]] * 3)
    os.setresuid(*[plan["user"]] * 3)
for name, value in plan["limits"].items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # One second later SIGKILL follows SIGXCPU.
    resource.setrlimit(getattr(resource, name), (value, value + (name == "RLIMIT_CPU")))
sys.path.append(plan["packages"])
sys.argv = [""]
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on nothing can be written where refusals are read
code, source = 1, plan["source"]
del plan, name, value, hard
try:
    exec(compile(source, "<sandbox>", "exec"), {"__name__": "__sandbox__"})
    sys.stdout.flush()
    code = 0
finally:
    os._exit(code)
"""
"""This runs first inside: it gives up what is left of its rights, and then runs the source."""


class SandboxRefused(UserError):
    """The sandbox cannot be set up here; one line that says why."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The code may use so much. The defaults are enough for references of HumanEval(+) and MBPP(+), Mbpp/255 aside."""

    cpu_seconds: int = 10
    """Processor time, for each process."""
    seconds: float = 60.0
    """Wall clock, for all of it; a busy machine gives a program a part of a processor."""
    memory: int = 2 << 30
    """Bytes of address space, for each process."""
    processes: int = 8
    """Processes and threads at one time, the first included."""
    open_files: int = 64


class Sandbox:
    """Starts Python source in a process of its own, apart from the machine.

    Making one runs an empty program, so that a machine without the means refuses before long work: SandboxRefused.
    ImportError where pedyra[tasks] is not installed.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        bubblewrap = shutil.which("bwrap") if sys.platform == "linux" else None
        if bubblewrap is None or not sys.executable:
            raise SandboxRefused(
                f"model-written code runs in bubblewrap, on Linux: this is {sys.platform}, Python is "
                f"{sys.executable or 'not known'}, and bwrap is not on the PATH; run {INSTALL}"
            )
        self._filter = _filter()
        # Where memory ends, this ends first.
        self._command = ["/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$0" "$@"', bubblewrap]
        self._command += ["--die-with-parent", "--new-session", "--clearenv"]
        for name, value in {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}.items():
            self._command += ["--setenv", name, value]
        self._command += [*_view(), "--remount-ro", "/", "--chdir", "/"]
        self._plan = {"packages": PACKAGES, "limits": _resource_limits(self.limits)}
        if self.finish(self.start("print('ready')", piped=True)) != (True, b"ready\n"):
            raise SandboxRefused(
                f"model-written code cannot be run here: {sys.executable} does not start in the sandbox"
            )

    def start(self, source: str, *, keep: Sequence[int] = (), piped: bool = False) -> subprocess.Popen[bytes]:
        """Run `source` as a program with the open files `keep`. `finish` must follow, which holds its clock.

        piped: stdin and stdout are those of `finish`, not /dev/null; for trusted programs, as stdout has no bound.
        """
        user = _stranger()
        plan = {**self._plan, "user": user, "source": source}
        if user is None:
            rights = ["--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY]
            plan["limits"] = {**plan["limits"], "RLIMIT_NPROC": self.limits.processes + 1}  # bubblewrap's process 1
        else:  # the rights are those that it takes to give up the rest, as another user
            rights = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
            rights += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        calls, told = os.pipe()
        os.write(told, self._filter)
        os.close(told)
        stream = subprocess.PIPE if piped else subprocess.DEVNULL
        python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _INSIDE, json.dumps(plan)]
        try:
            return subprocess.Popen(
                [*self._command, *rights, "--seccomp", f"{calls}", "--", *python],
                stdin=stream,
                stdout=stream,
                stderr=subprocess.PIPE,
                pass_fds=(*keep, calls),
                env={},
                cwd="/",
            )
        finally:
            os.close(calls)

    def finish(
        self, process: subprocess.Popen[bytes], given: bytes | None = None, seconds: float | None = None
    ) -> tuple[bool, bytes]:
        """Give the program its stdin and wait for its end: whether it came in time, and its stdout if it was piped.

        seconds: it is ended after so many; default: limits.seconds. `process.kill()` before this ends it at once.
        Raises SandboxRefused if it could not be set up.
        """
        try:
            output, refusal = process.communicate(given, timeout=seconds or self.limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False, b""
        if refusal:  # nothing inside holds this stream, so nothing inside can refuse
            raise SandboxRefused(
                f"model-written code cannot be run here: {refusal.decode(errors='replace').strip().splitlines()[-1]}; "
                "bubblewrap needs user namespaces, or root that may make others, and Linux 5.14 or newer"
            )
        return process.returncode != _OUT_OF_TIME, output or b""


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_NOFILE": limits.open_files,
        **dict.fromkeys(("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"), 0),
    }


def _stranger() -> int | None:
    """Find, for root, a user that owns and runs nothing: RLIMIT_NPROC does not hold root, and counts by user.

    None for others, and for root in a container that knows no second user: bubblewrap makes them nobody in a user
    namespace, where processes are counted apart.
    """
    if os.geteuid() != 0:
        return None
    extents = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(extents, key=lambda extent: extent[2])
    return first + count - 1 - random.SystemRandom().randrange(count // 2) if count > 1 else None


def _filter() -> bytes:
    """Make the system call filter as the kernel takes it."""
    try:
        from pyseccomp import ALLOW, ERRNO, MASKED_EQ, Arg, SyscallFilter
    except ImportError:
        raise ImportError(
            'running what a model writes needs pyseccomp; run in a checkout: pip install ".[tasks]"'
        ) from None
    except (OSError, RuntimeError) as error:
        raise SandboxRefused(f"model-written code needs libseccomp ({error}): {INSTALL}") from None
    calls = SyscallFilter(ALLOW)
    for name in _DENIED:
        calls.add_rule(ERRNO(errno.EPERM), name)
    calls.add_rule(ERRNO(errno.EPERM), "clone", Arg(0, MASKED_EQ, _NEW_USER_NAMESPACE, _NEW_USER_NAMESPACE))
    calls.add_rule(ERRNO(errno.ENOSYS), "clone3")  # a filter cannot look into its arguments; libc then uses clone
    with tempfile.TemporaryFile() as file:
        calls.export_bpf(file)
        file.seek(0)
        return file.read()


def _view() -> Iterator[str]:
    """Yield what of the machine is seen inside, as arguments of bubblewrap."""
    libraries = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo"]
    libraries += [f"{prefix}/{name}" for prefix in {sys.base_prefix, sys.base_exec_prefix} for name in ("lib", "lib64")]
    libraries += ["/etc/ld.so.cache", os.path.realpath(sys.executable)]
    links = {path for path in libraries if os.path.islink(path)}
    seen = list(dict.fromkeys(path for path in libraries if os.path.exists(path) and path not in links))
    seen = [path for path in seen if not any(path.startswith(f"{other}/") for other in seen)]
    for path in sorted(links):
        yield from ("--symlink", os.readlink(path), path)
    for path in seen:
        yield from _bind("--ro-bind", path, path)
        # Installed packages may hold the problems with their solutions.
        for name in ("site-packages", "dist-packages"):
            for hidden in glob.glob(f"{path}/python*/{name}"):
                yield from ("--tmpfs", hidden, "--remount-ro", hidden)
    for package in IMPORTABLE:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found else []:
            for folder in (place, f"{place}.libs"):  # the second is where a wheel keeps its shared libraries
                if os.path.isdir(folder):
                    yield from _bind("--ro-bind", folder, f"{PACKAGES}/{Path(folder).name}")
    for name in ("null", "zero", "random", "urandom"):
        yield from _bind("--dev-bind", f"/dev/{name}", f"/dev/{name}")


def _bind(how: str, source: str, target: str) -> Iterator[str]:
    """Yield it with the folders above it, which bubblewrap makes for root alone otherwise."""
    for folder in reversed(Path(target).parents[:-1]):
        yield from ("--dir", str(folder))
    yield from (how, source, target)
