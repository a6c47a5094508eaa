"""A checkpoint appears whole or not at all: wherever in a save the process is killed, a whole one is the last."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from file_changes import from_change, killed_at
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from pedyra.trainer.checkpoint_folder import checkpoint_step, find_flaw, list_checkpoints


@pytest.mark.parametrize(("limit", "step"), [(1, 8), (1, 10), (2, 10)], ids=["written again", "1 kept", "2 kept"])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint_as_the_last(
    limit, step, make_trainer, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which is for a loss of power, and takes half of the time
    run, before = tmp_path / "run", tmp_path / "before"
    trainer, callback = make_trainer(run, save_strategy="steps", save_steps=4, save_total_limit=limit, max_steps=8)
    trainer.train()
    trainer.state.global_step = callback.allocator.step = step
    shutil.copytree(run, before)
    last, point = [], 0
    killed = True
    while killed:
        point += 1
        killed = killed_at(point, run, lambda: trainer._save_checkpoint(trainer.model, None))
        last.append(get_last_checkpoint(str(run)))
        assert last[-1] is not None, f"nothing to resume from, killed before change {point}"
        assert find_flaw(Path(last[-1]), with_ranks=True) is None, f"killed before change {point}"
        if killed:
            shutil.rmtree(run)
            shutil.copytree(before, run)
    steps = [checkpoint_step(Path(each)) for each in last]
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (8, step) and point > 20
    kept = [4, 8] if step == 8 else [8, step]
    assert {path.name for path in run.iterdir()} == {f"checkpoint-{each}" for each in kept[-limit:]}


def test_a_disk_that_is_full_at_any_write_of_a_save_leaves_the_last_checkpoint_alone(make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1, max_steps=8)
    trainer.train()
    trainer.state.global_step = callback.allocator.step = 10

    def full(event: str) -> None:
        if event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device")

    for point in range(1, 100):
        with from_change(point, tmp_path, full) as failed:
            try:
                trainer._save_checkpoint(trainer.model, None)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        last = get_last_checkpoint(str(tmp_path))
        assert last is not None and find_flaw(Path(last), with_ranks=True) is None, failed
        if checkpoint_step(Path(last)) == 10:
            break
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"], failed  # and no space is taken
    assert point > 10


def test_a_save_after_a_kill_removes_what_the_kill_has_left(make_trainer, tmp_path):
    (tmp_path / "_saving" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "_saving" / "checkpoint-2" / "optimizer.pt").write_text("half")
    trainer, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=12)
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]


def test_the_best_checkpoint_is_kept_and_named_as_it_is(make_trainer, tmp_path):
    """Trainer looks for the best one beside what it writes, and writes its path into the state."""
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    judged = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
    }
    trainer, _ = make_trainer(tmp_path, **saved, **judged, greater_is_better=True, max_steps=8)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and Path(best).parent == tmp_path and find_flaw(Path(best), with_ranks=True) is None
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in list_checkpoints(tmp_path)]
    assert {state["best_model_checkpoint"] for state in states} == {best}


def test_a_push_to_the_hub_sees_the_checkpoint_under_its_own_name(make_trainer, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(os.listdir(folder)))
    trainer, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=12)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer.train()
    assert len(pushed) == 1 and "pedyra_state.json" in pushed[0]
