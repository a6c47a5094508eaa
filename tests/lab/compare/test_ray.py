"""Runs on a cluster of two nodes: the same rows as on this machine, whatever dies or is stopped on the way."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pedyra
from pedyra.lab.compare.compare import compare_experiment, open_experiment
from pedyra.lab.compare.grid import Grid, load_grid
from pedyra.lab.compare.jobs import HERE, Entry, Job
from pedyra.lab.compare.ray_engine import RayCluster, _on_a_node
from pedyra.lab.compare.results import Comparison

GRID = Path(__file__).parents[3] / "recipes" / "compare_smoke.yaml"
LONG = "training.max_steps=120", "training.save_steps=20", "training.save_total_limit=2", "tasks.toy.train_rows=256"


def grid(folder: str) -> Grid:
    return load_grid(GRID, ["methods=[pedyra]", f"output_dir={folder}", *LONG])


def reached(comparison: Comparison) -> list[Any]:
    assert not comparison.failed
    return [[row[key] for key in ("method", "seed", "value", "eval_loss", "metrics")] for row in comparison.rows]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The runs come to this on this machine, with nothing in their way."""
    os.chdir(tmp_path_factory.mktemp("here"))
    return reached(compare_experiment(open_experiment(grid("runs/x"))))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with one processor each, and an empty working directory."""
    ray = pytest.importorskip("ray", reason="needs pedyra[ray]")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.environ.get("PEDYRA_TEST_THREADS", "1")))
    started: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    monkeypatch.setenv("RAY_ADDRESS", started.address)
    ray.init("auto", log_to_driver=False)  # to the first node, which stays
    started.other = started.add_node(num_cpus=1)
    yield started
    ray.shutdown()
    started.shutdown()


def when(ready: Callable[[], bool], act: Callable[[], Any]) -> None:
    """Do this as soon as that is so."""

    def wait() -> None:
        while not ready():
            time.sleep(0.1)
        act()

    threading.Thread(target=wait, daemon=True).start()


pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.mark.slow
def test_a_run_whose_node_dies_goes_on_on_another(expected: list[Any], cluster: Any):
    both = "jobs/pedyra/toy/r2/lr0.01/seed?/checkpoint-40"
    when(
        lambda: len(list(Path("runs/x").glob(both))) == 2,
        lambda: cluster.remove_node(cluster.other, allow_graceful=False),
    )
    assert reached(compare_experiment(open_experiment(grid("runs/x")), RayCluster("auto"))) == expected
    begun = [log.read_text().count("step 24/120") for log in Path("runs").rglob("seed?.log")]
    assert begun == [1, 1]  # the one that had to move went on from its checkpoint


@pytest.mark.slow
def test_after_ctrl_c_the_next_call_goes_on(expected: list[Any], cluster: Any):
    when(lambda: any(Path("runs/x").rglob("checkpoint-40")), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        compare_experiment(open_experiment(grid("runs/x")), RayCluster("auto"))
    assert reached(compare_experiment(open_experiment(grid("runs/x")), HERE)) == expected
    begun = [log.read_text().count("step 24/120") for log in Path("runs").rglob("seed?.log")]
    assert begun == [1, 1]


def test_what_a_node_lacks_is_the_reason_of_a_failure(tmp_path: Path):
    job = Job(Entry("lora", "toy", 2), 0.1, 0, "jobs", tmp_path / "elsewhere", {})
    for version, message in (
        (pedyra.__version__, "does not see .*elsewhere; give"),
        ("7.0", r"install pedyra\[cli\] 7.0"),
    ):
        end = _on_a_node(job, os.getcwd(), version)
        assert end and end.status == "failed" and re.search(message, end.message)


def test_what_is_no_address_is_refused():
    pytest.importorskip("ray", reason="needs pedyra[ray]")
    with pytest.raises(ValueError, match=r"--ray is 'nowhere:6379'; it is auto, ray://HOST:PORT or local"):
        RayCluster("nowhere:6379")


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_told_in_one_line(monkeypatch):
    pytest.importorskip("ray", reason="needs pedyra[ray]")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in ("auto", "ray://127.0.0.1:9"):
        with pytest.raises(ValueError, match=f"--ray {address}: no cluster answers .* start one with ray start --head"):
            RayCluster(address)


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[ray\]\""):
        RayCluster("local")
