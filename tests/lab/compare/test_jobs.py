"""Jobs are processes: finished ones are skipped, interrupted ones resume, failed ones do not stop the rest."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pedyra.lab.compare.jobs import Entry, Job, ThisMachine, run_jobs

FAKE = {"lora": 0.5, "pedyra": "crash", "dora": "kill", "prune": "wait"}


@pytest.fixture
def job(folder: Path):
    """job(method, seed): a job of the trainer without a model."""

    def make(method: str, seed: int = 0) -> Job:
        entry = Entry(method, "toy", 2)
        made = Job(entry, 0.1, seed, "jobs", Path("out"), {})
        training = {"learning_rate": 0.1, "fake": FAKE}
        made.recipe.update(method={"name": method}, seed=seed, output_dir=str(made.run), training=training)
        return made

    return make


def run_all(jobs, workers=2):
    outcomes = []
    run_jobs(jobs, outcomes.append, ThisMachine(workers))
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


def test_the_reason_is_that_of_the_last_attempt(job):
    """The first one said why it failed. The second is killed without a word."""
    run_all([job("pedyra")])
    again = job("pedyra")
    again.recipe["method"] = {"name": "dora"}  # which is killed
    (again.run / "recipe.yaml").unlink()
    assert run_all([again])["pedyra", 0].message.startswith("it said nothing (killed by SIGKILL")
    assert "out of luck" in again.log.read_text()  # of the first


def test_a_job_that_cannot_start_fails_alone(job, monkeypatch):
    def start(*arguments, **more):
        raise OSError("no space left on device")

    monkeypatch.setattr("pedyra.lab.compare.jobs.subprocess.Popen", start)
    outcomes = run_all([job("lora", seed) for seed in range(2)])
    assert [outcome.status for outcome in outcomes.values()] == ["failed"] * 2
    assert "no space left" in outcomes["lora", 1].message


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
    assert calls() == ["pedyra 0 0.1", "pedyra 0 0.1 --overwrite"]


def test_a_refusal_that_passes_keeps_the_checkpoint(job, calls, monkeypatch):
    """A full disk, say, or another process that trains the run now."""
    run_all([job("pedyra")])
    checkpoint = (Path("checkpoint-5"), [])
    monkeypatch.setattr("pedyra.lab.compare.jobs.last_complete_checkpoint", lambda run, with_ranks: checkpoint)
    assert run_all([job("pedyra")])["pedyra", 0].status == "failed"
    assert calls() == ["pedyra 0 0.1", "pedyra 0 0.1 --resume"]


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
        run_jobs([job("prune"), job("lora")], outcomes.append, ThisMachine())
    assert [(outcome.job.entry.method, outcome.status) for outcome in outcomes] == [("prune", "stopped")]
    assert calls() == ["prune 0 0.1"]
    assert run_all([job("prune")])["prune", 0].status == "done"
    assert calls()[1:] == ["prune 0 0.1 --resume"]
