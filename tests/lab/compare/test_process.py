"""A run in a fork is a process like any other: its own log, exit code and session, and it holds the lock."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pedyra.lab.compare.process import Forked, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are for Linux without an accelerator")

SMOKE = Path(__file__).parents[3] / "recipes" / "smoke.yaml"


def locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@pytest.fixture
def lock(tmp_path: Path) -> int:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_mistake_ends_with_its_code_and_is_told_in_the_log(tmp_path: Path, lock: int):
    child = Forked(["train", "missing.yaml"], tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"}, lock)
    assert child.wait() == 2
    assert "missing.yaml" in (tmp_path / "log").read_text()
    os.close(lock)


def test_the_lock_is_held_until_the_run_ends(tmp_path: Path, lock: int):
    arguments = ["train", str(SMOKE), "training.max_steps=100000", f"output_dir={tmp_path / 'run'}"]
    child = Forked(arguments, tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"}, lock)
    os.close(lock)  # as if the comparison had been killed
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    assert locked(tmp_path / "lock")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130 and list((tmp_path / "run").glob("checkpoint-*"))
    assert not locked(tmp_path / "lock")


def test_a_fork_of_a_process_that_ignores_interrupts_does_not():
    # What a fork server does with SIGINT: ignores it itself, and gives every fork the handler it found.
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's background process
import pedyra.lab.compare.preload
found = signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.raise_signal(signal.SIGINT)  # right after the fork
signal.signal(signal.SIGINT, found)
print(signal.SIGINT in signal.sigpending())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_an_interrupt_before_the_run_can_take_it_is_not_lost(tmp_path: Path, lock: int):
    arguments = ["train", str(SMOKE), "training.max_steps=100000", f"output_dir={tmp_path / 'run'}"]
    child = Forked(arguments, tmp_path / "log", {**os.environ, "OMP_NUM_THREADS": "1"}, lock)
    child.send_signal(signal.SIGINT)
    os.close(lock)
    try:
        assert child.wait(timeout=60) in (1, 130)
    finally:
        child.kill()
