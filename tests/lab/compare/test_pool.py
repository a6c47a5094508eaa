"""Jobs are processes: finished ones are skipped, interrupted ones resume, failed ones do not stop the rest."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pedyra.lab.compare.jobs import Entry, Job, is_done, run_job
from pedyra.lab.compare.pool import LocalPool

FAKE = {"lora": 0.5, "pedyra": "crash", "dora": "kill", "prune": "wait"}


@pytest.fixture
def job(folder: Path):
    """job(method, seed): a job of the trainer without a model."""

    def make(method: str, seed: int = 0) -> Job:
        entry = Entry(method, "toy", 2)
        made = Job(entry, 0.1, seed, "jobs", Path("out"), {})
        training = {"learning_rate": 0.1, "fake": FAKE}
        made.recipe.update(method=method, seed=seed, output_dir=str(made.run), training=training)
        return made

    return make


def run_all(jobs, workers=2):
    outcomes = []
    LocalPool(workers).run(jobs, outcomes.append)
    return {(outcome.job.entry.method, outcome.job.seed): outcome for outcome in outcomes}


def test_one_that_fails_does_not_stop_the_rest_and_says_why(job):
    outcomes = run_all([job("pedyra"), job("lora", 0), job("dora"), job("lora", 1)])
    assert {key: outcome.status for key, outcome in outcomes.items()} == {
        ("pedyra", 0): "failed",
        ("lora", 0): "done",
        ("dora", 0): "failed",
        ("lora", 1): "done",
    }
    assert (
        "RuntimeError: out of luck (exit code 1; out/jobs/pedyra/toy/r2/lr0.1/seed0.log)"
        in outcomes["pedyra", 0].message
    )
    assert "killed by SIGKILL" in outcomes["dora", 0].message


def test_a_process_that_dies_before_it_has_a_log_fails_alone(job):
    class Dead:
        def wait(self, timeout: float | None = None) -> int:
            return -signal.SIGKILL

    def start(*arguments):
        if next(count) == 1:
            raise OSError("no space left on device")
        return Dead()

    count, outcomes = itertools.count(), []
    LocalPool(1, start).run([job("lora", seed) for seed in range(3)], outcomes.append)  # type: ignore[arg-type]
    assert [outcome.status for outcome in outcomes] == ["failed"] * 3
    assert "killed by SIGKILL" in outcomes[0].message and "no space left" in outcomes[1].message


def test_what_is_done_is_skipped(job, calls):
    run_all([job("lora")])
    outcomes = run_all([job("lora")])
    assert outcomes["lora", 0].status == "done" and calls() == ["lora 0 0.1"]


def test_what_was_killed_resumes_from_its_checkpoint(job, calls):
    run_all([job("dora")])
    assert run_all([job("dora")])["dora", 0].status == "done"
    assert calls() == ["dora 0 0.1", "dora 0 0.1 --resume"]


def test_what_cannot_resume_starts_anew(job, calls):
    run_all([job("pedyra")])  # crashed before its first checkpoint
    run_all([job("pedyra")])
    assert calls() == ["pedyra 0 0.1", "pedyra 0 0.1 --resume", "pedyra 0 0.1 --overwrite"]


@pytest.fixture
def ignored_interrupts():
    """SIGINT is ignored, as a process inherits it that a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ignored_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_lets_running_jobs_save_and_starts_no_other(number, job, folder, calls):
    def interrupt():
        while not (folder / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    outcomes = []
    with pytest.raises(KeyboardInterrupt):
        LocalPool(1).run([job("prune"), job("lora")], outcomes.append)
    assert [(outcome.job.entry.method, outcome.status) for outcome in outcomes] == [("prune", "stopped")]
    assert calls() == ["prune 0 0.1"]
    assert run_all([job("prune")])["prune", 0].status == "done"
    assert calls()[1:] == ["prune 0 0.1 --resume"]


def test_the_run_of_a_killed_comparison_is_waited_for(job, folder, calls):
    """Its child goes on alone, and nobody writes into the same folder meanwhile."""
    waiting = folder / "waiting"
    code = f"from pathlib import *; from pedyra.lab.compare.jobs import *; run_job({job('prune')!r}, 1)"
    parent = subprocess.Popen([sys.executable, "-c", code.replace("PosixPath", "Path")])
    while not (waiting.exists() and waiting.read_text()):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    outcomes = []
    second = threading.Thread(target=lambda: outcomes.append(run_job(job("prune"), 1)))
    second.start()
    time.sleep(0.5)
    assert calls() == ["prune 0 0.1"]
    os.kill(int(waiting.read_text()), signal.SIGINT)
    second.join(30)
    assert outcomes[0].status == "done" and is_done(job("prune"))
    assert calls() == ["prune 0 0.1", "prune 0 0.1 --resume"]


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="--workers is 0"):
        LocalPool(0)
