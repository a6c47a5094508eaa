"""Model-written code ends, is told from a right solution, and reaches nothing outside."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pedyra.app.tasks import sandbox as sandbox_file
from pedyra.app.tasks.sandbox import Sandbox
from pedyra.errors import UserError


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as limits:
        limits.setattr(sandbox_file, "CPU_SECONDS", 1)
        limits.setattr(sandbox_file, "MEMORY", 512 << 20)
        try:
            result = Sandbox()
        except UserError as refusal:
            pytest.skip(str(refusal))
        yield result


GOOD = "def double(x):\n    return x * 2\n"
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]"


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (GOOD, "passed"),
        ("from __future__ import annotations\n" + GOOD, "passed"),
        ("import os\nif os.fork() == 0:\n    import time; time.sleep(99)\n" + GOOD, "passed"),  # it is not waited for
        ("print('x' * 10**7)\n" + GOOD, "passed"),
        ("def double(x):\n    return x + 2 if isinstance(x, int) else x\n", "failed"),
        ("def double(x):\n    return y\n", "failed"),
        ("def other(x):\n    return 2 * x\n", "failed"),
        ("def double(x)\n    return 2 * x\n", "failed"),
        # It ends before the tests do.
        ("import sys\nsys.exit(0)\n" + GOOD, "failed"),
        ("import os\nos._exit(0)\n" + GOOD, "failed"),
        # It asks for more than there is.
        ("def double(x):\n    while True: pass\n", "timeout"),
        ("def double(x):\n    return len(bytearray(100 << 30))\n", "failed"),
        ("def double(x):\n    return double(x)\n", "failed"),
    ],
)
def test_a_solution_passes_where_its_tests_come_to_their_end(sandbox: Sandbox, program: str, status: str) -> None:
    began = time.monotonic()
    assert sandbox.run([program, TESTS]) == status
    assert time.monotonic() - began < sandbox_file.SECONDS / 2


@pytest.mark.usefixtures("sandbox")
def test_a_solution_that_sleeps_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_file, "SECONDS", 2)
    assert Sandbox().run(["import time; time.sleep(99)"]) == "timeout"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nassert set(os.environ) <= {'LANG', 'OPENBLAS_NUM_THREADS', 'PWD'}",
        "import os\nassert os.getuid() == 65534 and not os.path.exists('/proc/1')",
        "import socket\ntry: socket.create_connection(('127.0.0.1', 22), 2)\nexcept OSError: pass\nelse: assert False",
        "import socket\ntry: socket.getaddrinfo('huggingface.co', 443)\nexcept OSError: pass\nelse: assert False",
        "from importlib.util import find_spec\nassert find_spec('torch') is None and find_spec('pip') is None",
        "import numpy\nassert numpy.arange(4).sum() == 6",
        "open('/tmp/mine', 'w').write('1')\nassert open('/tmp/mine').read() == '1'",
    ],
)
def test_inside_there_is_nothing_but_the_interpreter(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run([program]) == "passed"


def test_no_file_of_the_machine_is_read_or_written(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "reference.txt"
    secret.write_text("4")
    acts = [
        f"open({str(secret)!r}).read()",
        f"open({sandbox_file.__file__!r}).read()",
        "open('/etc/passwd').read()",
        f"open({str(tmp_path / 'mark')!r}, 'w')",
        "open('/mark', 'w')",
        "open('/usr/mark', 'w')",
        "import os; os.remove(os.__file__)",
    ]
    assert {act: sandbox.run([f"try:\n    {act}\nexcept OSError: pass\nelse: assert False"]) for act in acts} == {
        act: "passed" for act in acts
    }
    assert secret.read_text() == "4" and [each.name for each in tmp_path.iterdir()] == ["reference.txt"]


@pytest.mark.usefixtures("sandbox")
def test_what_cannot_be_set_up_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_file, "_view", lambda: ["--ro-bind", "/nowhere", "/nowhere"])
    with pytest.raises(UserError, match=r"^model-written code cannot be run here: [^\n]*nowhere[^\n]*$"):
        Sandbox()


@pytest.mark.parametrize(("platform", "told"), [("linux", "apt install bubblewrap"), ("darwin", "this is darwin")])
def test_a_system_without_the_means_is_refused(monkeypatch: pytest.MonkeyPatch, platform: str, told: str) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(UserError, match=rf"^model-written code [^\n]*{told}"):
        Sandbox()
