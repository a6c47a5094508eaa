"""What model-written code cannot do, and that doing it is never a pass."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pedyra.app.tasks import sandbox as sandbox_file
from pedyra.app.tasks.code import CodeProblem, Judged, check
from pedyra.app.tasks.sandbox import Limits, Sandbox, SandboxRefused

LIMITS = Limits(cpu_seconds=1, memory=512 << 20, processes=4)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except (SandboxRefused, ImportError) as refusal:
        pytest.skip(str(refusal))


DOUBLE = CodeProblem(
    task_id="double",
    prompt="def double(x):\n",
    entry_point="double",
    solution="def double(x):\n    return 2 * x",
    stop=(),
    tests="assert double(2) == 4\nassert double([1]) == [1, 1], 'a list'",
)


@pytest.fixture
def score(sandbox: Sandbox) -> Callable[[str], Judged]:
    """score(program): the outcome of a program that should define `double`."""
    return lambda program: check(DOUBLE, program, sandbox)


@pytest.fixture
def probe(sandbox: Sandbox) -> Callable[..., None]:
    """probe(body, expected): what a function of this body gives inside is `expected`."""

    def ask(body: str, expected: Any) -> None:
        program = "def probe():\n" + "".join(f"    {line}\n" for line in body.splitlines())
        tests = f"result = probe()\nassert result == {expected!r}, repr(result)"
        outcome = check(
            CodeProblem(task_id="", prompt="", entry_point="probe", solution="", stop=(), tests=tests), program, sandbox
        )
        assert outcome.status == "passed", outcome

    return ask


GOOD = "def double(x):\n    return x * 2\n"


def test_a_right_solution_passes_and_a_wrong_one_fails(score: Callable[[str], Judged]) -> None:
    assert score(GOOD).status == "passed"
    wrong = score("def double(x):\n    return x + 2 if isinstance(x, int) else x\n")
    assert (wrong.status, wrong.reason) == ("failed", "a list")
    assert score("def double(x):\n    return 5\n").status == "failed"


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("def double(x):\n    return y\n", "error", "NameError"),
        ("def other(x):\n    return 2 * x\n", "error", "'double' is not defined"),
        ("def double(x)\n    return 2 * x\n", "unparsable", ""),
        ("", "unparsable", ""),
        # ended before the checks
        ("import sys\nsys.exit(0)\n" + GOOD, "error", "SystemExit"),
        ("import os\nos._exit(0)\n" + GOOD, "error", "ended"),
        ("import os\ndef double(x):\n    os._exit(125)\n", "error", "ended"),
        ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "error", "SystemExit"),
        ("import os, signal\ndef double(x):\n    os.kill(os.getpid(), signal.SIGKILL)\n", "error", "ended"),
        (
            "import os, signal\ndef double(x):\n    os.kill(1, signal.SIGINT)\n    os.kill(-1, 9)\n",
            "error",
            "[Errno",
        ),
        # checks that are patched, and values that lie
        ("class AssertionError(Exception): pass\ndef double(x):\n    return 0\n", "failed", ""),
        ("import builtins\nbuiltins.AssertionError = KeyError\ndef double(x):\n    return 0\n", "failed", ""),
        ("class Any:\n    def __eq__(self, other): return True\ndef double(x):\n    return Any()\n", "failed", ""),
        (
            "class Any(int):\n    def __eq__(self, other): return True\ndef double(x):\n    return Any(0)\n",
            "failed",
            "",
        ),
        ("import sys\nsys.modules['json'].dumps = None\ndef double(x):\n    return 4\n", "error", "ended"),
        ("def double(x):\n    raise AssertionError\n", "error", "AssertionError"),
        # verdicts written early, wherever they can be written
        (
            'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"status": "passed", "reason": ""}\')\n'
            "    except OSError: pass\ndef double(x):\n    return 0\n",
            "error",
            "no plain data",
        ),
        (
            "import sys\nsys.stderr.write('refused')\nprint('passed' * 10**6)\ndef double(x):\n    return 0\n",
            "failed",
            "",
        ),
        # more than there is
        ("def double(x):\n    while True: pass\n", "timeout", ""),
        ("import os\nwhile True:\n    os.fork()\n", "error", ""),
        ("def double(x):\n    return len(bytearray(100 << 30))\n", "error", "MemoryError"),
        ("def double(x):\n    return double(x)\n", "error", "RecursionError"),
        ("for n in range(10**6):\n    open(f'{n}', 'w')\n", "error", "Read-only file system"),
        ("open('/packages/big', 'wb').write(bytes(2 << 20))\n", "error", "Read-only file system"),
        ("def double(x):\n    x = []\n    x.append(x)\n    return x\n", "error", "RecursionError"),
    ],
)
def test_what_is_no_solution_is_no_pass(score: Callable[[str], Judged], program: str, status: str, reason: str) -> None:
    outcome = score(program)
    assert outcome.status == status, outcome
    assert reason in outcome.reason


def test_what_a_solution_leaves_running_is_not_waited_for(score: Callable[[str], Judged]) -> None:
    started = "import os, threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
    began = time.monotonic()
    assert score(started + "if os.fork() == 0:\n    time.sleep(99)\n" + GOOD).status == "passed"
    assert time.monotonic() - began < LIMITS.seconds / 2


def test_an_error_in_characters_that_are_none_is_an_error(score: Callable[[str], Judged]) -> None:
    assert score("raise ValueError('\\x1b[2J\\n\\ud800\\u00e9')").status == "error"


def test_a_program_that_sleeps_ends_with_its_time(sandbox: Sandbox) -> None:
    ended = sandbox.finish(
        sandbox.start("import time, signal\nsignal.pthread_sigmask(0, {15})\ntime.sleep(9)"), seconds=0.3
    )
    assert ended == (False, b"")


@pytest.mark.usefixtures("sandbox")
def test_a_solution_that_never_answers_is_a_timeout() -> None:
    began = time.monotonic()
    outcome = check(DOUBLE, "import time\ndef double(x):\n    time.sleep(99)\n", Sandbox(Limits(seconds=2)))
    assert outcome.status == "timeout" and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # nothing is inherited
        (
            "import os\nreturn set(os.environ) - {'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS'}",
            {"PWD", "LANG"},
        ),
        ("import os\nreturn os.getcwd(), sorted(os.listdir('/dev'))", ("/", ["null", "random", "urandom", "zero"])),
        # a user without rights who cannot become another
        ("import os\nreturn os.getuid() >= 1000, os.getgid() >= 1000, set(os.getgroups()) <= {65534}", (True,) * 3),
        ("import os\ntry:\n    os.setresuid(0, 0, 0)\nexcept OSError:\n    return 'denied'", "denied"),
        (
            "import os\nreturn [p for p in ('/proc', '/sys', '/home', '/tmp', '/dev/shm') if os.path.exists(p)]",
            [],
        ),
        # no network, not even a socket; no way to another namespace or another process's memory
        ("import socket\ntry:\n    socket.socket()\nexcept PermissionError:\n    return 'denied'", "denied"),
        ("import os\ntry:\n    os.memfd_create('m')\nexcept PermissionError:\n    return 'denied'", "denied"),
        ("import ctypes\nreturn ctypes.CDLL(None).unshare(0x10000000)", -1),  # a user namespace
        ("import ctypes\nreturn ctypes.CDLL(None).ptrace(16, 1, 0, 0)", -1),  # attach to process 1
        ("import ctypes\nreturn ctypes.CDLL(None).shmget(0, 4096, 0o1600)", -1),
        ("import ctypes\nreturn ctypes.CDLL(None).mount(b'none', b'/packages', b'tmpfs', 0, None)", -1),
        # no installed package but those named: some hold the reference solutions
        ("from importlib.util import find_spec\nreturn [find_spec(name) for name in ('torch', 'pip')]", [None, None]),
        # what may be used still works
        ("open('/dev/null', 'w').write('\u00e9 \u4e2d')\nreturn open('/dev/null').read()", ""),
        ("import numpy\nreturn int(numpy.arange(4).sum())", 6),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\nreturn 1", 1),
    ],
)
def test_inside_there_is_nothing_but_the_interpreter(probe: Callable[..., None], body: str, expected: Any) -> None:
    probe(body, expected)


def test_no_file_of_the_machine_is_read_or_written(probe: Callable[..., None], tmp_path: Path) -> None:
    secret = tmp_path / "reference.txt"
    secret.write_text("4")
    places = [str(tmp_path), "/", "/tmp", "/usr/lib", os.path.dirname(os.__file__), "/packages/numpy", "/dev"]
    probe(
        f"""import os
def attempt(act):
    try: return act()
    except OSError: return 'denied'
links = [attempt(lambda: os.symlink({str(tmp_path)!r}, p + '/link')) for p in {places!r}]
reads = [attempt(lambda: open(p).read()) for p in ({str(secret)!r}, {sandbox_file.__file__!r}, '/etc/passwd')]
writes = [attempt(lambda: open(p + '/mark', 'w')) for p in {places!r}]
removed = attempt(lambda: os.remove({str(secret)!r})), attempt(lambda: os.remove(os.__file__))
return set(links + reads + writes + list(removed))""",
        {"denied"},
    )
    assert secret.read_text() == "4" and os.listdir(tmp_path) == ["reference.txt"]


def test_processes_are_few_and_none_outlives_the_check(probe: Callable[..., None]) -> None:
    name = f"pedyra{uuid.uuid4().hex[:8]}"  # 15 bytes are kept
    probe(
        f"""import ctypes, os, time
ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)
made = 0
for _ in range(20):
    try:
        child = os.fork()
    except BlockingIOError:
        break
    made += 1
    if child == 0:
        os.setsid()
        time.sleep(1000)
return made""",
        LIMITS.processes - 1,
    )
    deadline = time.monotonic() + 5
    while name in names() and time.monotonic() < deadline:  # the kernel ends them one by one
        time.sleep(0.01)
    assert name not in names()


def names() -> list[str]:
    """Of all processes of the machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text().strip())
    return found


def test_what_cannot_be_set_up_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyseccomp")
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    # On a machine with namespaces the mount is what fails, elsewhere they are.
    monkeypatch.setattr(sandbox_file, "_view", lambda: ["--ro-bind", "/nowhere", "/nowhere"])
    with pytest.raises(SandboxRefused, match=r"^model-written code cannot be run here: [^\n]+$"):
        Sandbox(LIMITS)


@pytest.mark.parametrize(("platform", "told"), [("linux", "apt install bubblewrap"), ("darwin", "this is darwin")])
def test_a_system_without_the_means_is_refused(monkeypatch: pytest.MonkeyPatch, platform: str, told: str) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(SandboxRefused, match=rf"^model-written code [^\n]*{told}"):
        Sandbox()
