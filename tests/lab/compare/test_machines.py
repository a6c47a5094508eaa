"""What runs jobs is checked at once; on Ray, those of a node that dies go on elsewhere, and none runs twice."""

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

from pedyra.lab.compare.jobs import Entry, Job
from pedyra.lab.compare.machines import Machines


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[ray\]"'):
        Machines(ray="local").runner().__enter__()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_on_which_nobody_listens_is_told_at_once(scheme: str):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{bound.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ValueError, match=f"--ray {address} does not answer"):
            Machines(ray=address).check()
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "ray://"])
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ValueError, match="is no address; it is host:port, ray://host:port, auto or local"):
        Machines(ray=address).check()


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="--workers is 0"):
        Machines(workers=0)


def ray_is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def fake_jobs(**fakes: str | float) -> list[Job]:
    """Method -> how the fixture's training ends, or takes."""
    jobs = []
    for method, fake in fakes.items():
        job = Job(Entry(method, "toy", 2), 0.1, 0, "jobs", Path("out"), {})
        job.recipe.update(method=method, seed=0, output_dir=str(job.run))
        job.recipe["training"] = {"learning_rate": 0.1, "fake": {method: fake}}
        jobs.append(job)
    Path("out").mkdir()
    return jobs


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


def is_running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie has none
    except OSError:
        return False


def ancestors(pid: int) -> list[int]:
    found = [pid]
    while found[-1] > 1:
        found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rpartition(")")[2].split()[1]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not ray_is_installed(), reason="needs ray: pip install 'pedyra[ray]'")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_of_this_process_alone_runs_every_job_once_tells_failures_and_ends_with_the_pool(folder, calls):
    import ray

    outcomes = []
    with Machines(ray="local").runner() as run_jobs:
        run_jobs(fake_jobs(prune=0.5, lora=0.4, dora="crash"), outcomes.append)
    assert not ray.is_initialized()
    ended = {outcome.job.entry.method: (outcome.status, outcome.message) for outcome in outcomes}
    assert ended["prune"] == ended["lora"] == ("done", "") and len(outcomes) == 3
    assert ended["dora"][0] == "failed" and "out of luck" in ended["dora"][1]
    assert sorted(calls()) == ["dora 0 0.1", "lora 0 0.1", "prune 0 0.1"]


@pytest.mark.slow
@pytest.mark.skipif(not ray_is_installed(), reason="needs ray: pip install 'pedyra[ray]'")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker in /proc")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_when_a_node_of_two_dies_its_job_goes_on_at_the_other_and_none_runs_twice(folder, calls):
    from ray.cluster_utils import Cluster

    jobs = fake_jobs(prune="wait", lora=0.5, dora=0.4, pedyra=0.6)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    killed = []

    def kill() -> None:
        while not (folder / "waiting").exists():
            time.sleep(0.05)
        ((child, worker),) = processes_of(str(jobs[0].run) + ".yaml")
        above = ancestors(child)
        (node,) = [node for node in nodes if any(p.process.pid in above for p in node.all_processes["raylet"])]
        cluster.remove_node(node, allow_graceful=False)
        while is_running(worker):
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)  # it would have gone with its machine
        killed.append(node)

    outcomes = []
    try:
        with Machines(ray=str(cluster.address)).runner() as run_jobs:
            threading.Thread(target=kill, daemon=True).start()
            run_jobs(jobs, outcomes.append)
    finally:
        cluster.shutdown()
    assert killed and [(o.status, o.message) for o in outcomes] == [("done", "")] * 4
    assert sorted(calls()) == ["dora 0 0.1", "lora 0 0.1", "pedyra 0 0.1", "prune 0 0.1", "prune 0 0.1 --resume"]
