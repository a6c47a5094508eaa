"""Jobs on Ray: a cluster that does not answer is told in time, and the job of a killed worker goes on."""

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

from pedyra.experiments import ray_pool
from pedyra.experiments.jobs import Cell, Job
from pedyra.experiments.ray_pool import RayPool, check_answers


@pytest.fixture
def listening():
    """A port whose server accepts connections; what it answers to the first is put into `answer`."""
    server = socket.create_server(("127.0.0.1", 0))
    yield server
    server.close()


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_that_accepts_but_never_answers_is_told_in_time(listening):
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"--ray ray://{address_of(listening)} does not answer \(no answer within 0.3 s"
    ):
        check_answers(f"ray://{address_of(listening)}", seconds=0.3)
    assert time.monotonic() - started < 3


def test_a_closed_port_is_told_at_once(listening):
    address = address_of(listening)
    listening.close()
    with pytest.raises(ValueError, match=f"--ray {address} does not answer"):
        check_answers(address)


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "ray://"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="is no address; it is host:port, ray://host:port, auto or local"):
        check_answers(address)


@pytest.mark.parametrize(("answer", "speaks_http2"), [(b"\0\0\0\4\0\0\0\0\0", True), (b"HTTP/1.1 400", False)])
def test_only_a_server_that_speaks_the_protocol_is_good_enough_to_go_on(listening, answer, speaks_http2):
    def serve():
        connection, _ = listening.accept()
        with connection:
            connection.recv(100)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    if speaks_http2:
        check_answers(address_of(listening), seconds=5)
    else:
        with pytest.raises(ValueError, match="does not speak Ray's protocol"):
            check_answers(address_of(listening), seconds=5)
    thread.join()


def test_ten_seconds_are_the_limit():
    assert ray_pool.ANSWER_SECONDS == 10


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "pedyra\[ray\]"'):
        RayPool("local")


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
        job = Job(Cell(method, "toy", 2), 0.1, 0, "jobs", Path("out"), {})
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
    ended = {outcome.job.cell.method: (outcome.status, outcome.message) for outcome in outcomes}
    assert ended == {"prune": ("done", ""), "lora": ("done", "")}
    assert "prune 0 0.1 --resume" in calls()
