"""Jobs on Ray: the job of a killed worker goes on."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from pedyra.compare.jobs import Entry, Job
from pedyra.compare.ray_pool import RayPool, check_ray_address


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "pedyra\[ray\]"'):
        RayPool("local")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_on_which_nobody_listens_is_told_at_once(scheme: str):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{bound.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ValueError, match=f"--ray {address} does not answer"):
            check_ray_address(address)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "ray://"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ValueError, match="is no address; it is host:port, ray://host:port, auto or local"):
        check_ray_address(address)


def ray_is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def processes_of(recipe: str) -> list[tuple[int, int]]:
    """(pid, parent's pid) of the processes with this file on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and recipe.encode() in (entry / "cmdline").read_bytes():
                found.append((int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not ray_is_installed(), reason="needs ray: pip install 'pedyra[ray]'")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_worker_killed_in_mid_job_costs_nothing_but_the_steps_since_the_checkpoint(folder, calls):
    jobs = []
    for method in ("prune", "lora"):
        job = Job(Entry(method, "toy", 2), 0.1, 0, "jobs", Path("out"), {})
        fake = {"prune": "wait", "lora": 0.5}
        job.recipe.update(method=method, seed=0, output_dir=str(job.run))
        job.recipe["training"] = {"learning_rate": 0.1, "fake": fake}
        jobs.append(job)
    Path("out").mkdir()

    def kill() -> None:
        while not (folder / "waiting").exists():
            time.sleep(0.05)
        ((child, worker),) = processes_of(str(jobs[0].run) + ".yaml")
        os.kill(worker, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)

    outcomes = []
    pool = RayPool("local")
    try:
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        pool.run(jobs, outcomes.append)
    finally:
        pool.close()
    ended = {outcome.job.entry.method: (outcome.status, outcome.message) for outcome in outcomes}
    assert ended == {"prune": ("done", ""), "lora": ("done", "")}
    assert "prune 0 0.1 --resume" in calls()
