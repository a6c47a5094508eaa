"""The side file of a checkpoint: told when it cannot be used, and never half-written without being noticed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from windows import SCHEDULE, STEPS, allocate, forced

from pedyra.allocate import checkpoint
from pedyra.allocate.checkpoint import STATE_RECORD, TENSORS
from pedyra.lora.files import SUMS, write_file, write_sums

EVERY_4 = {"save_strategy": "steps", "save_steps": 4}


# Side files that cannot be used: told with file and problem.


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "template"


@pytest.fixture
def stopped(make_trainer, quick, tmp_path, template) -> Path:
    """A run folder with checkpoint-4 and checkpoint-8, some layers at rank 0; trained once, then copied."""
    if not template.exists():
        make_trainer(template, quick(min_rank=0, moves=7), **EVERY_4)[0].train()
    return Path(shutil.copytree(template, tmp_path / "run"))


def _edit(path: Path, **changes: Any) -> None:
    _write(path, {**json.loads(path.read_text()), **changes})


def _write(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record))
    _resum(path.parent)


def _resum(folder: Path) -> None:
    """As if the files had been saved as they are."""
    write_sums(folder, [path.name for path in folder.iterdir() if path.name != SUMS])


def _of_another_model(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    write_pair(folder, {name.replace("layer.0", "layer.7"): value for name, value in tensors.items()})


def write_pair(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS)
    _resum(folder)


def _side_file_of(other: str):
    def copy(folder: Path) -> None:
        for name in (TENSORS, STATE_RECORD):
            shutil.copy(folder.parent / other / name, folder / name)

    return copy


DAMAGE: dict[str, tuple[Any, str]] = {
    "no record": (lambda f: (f / STATE_RECORD).unlink(), rf"checkpoint-8/{STATE_RECORD} is missing"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), rf"checkpoint-8/{TENSORS} is missing"),
    "cut record": (
        lambda f: (f / STATE_RECORD).write_text((f / STATE_RECORD).read_text()[:99]),
        rf"{STATE_RECORD} does not match {SUMS}: damaged",
    ),
    "a list": (lambda f: _write(f / STATE_RECORD, []), rf"{STATE_RECORD}: the whole is \[\], must be an object"),
    "other format": (lambda f: _edit(f / STATE_RECORD, format=99), "has format 99; this pedyra reads ."),
    "flipped bit": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1] + b"\x55"),
        rf"checkpoint-8/{TENSORS} does not match {SUMS}: damaged",
    ),
    "cut tensors": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:500]),
        rf"checkpoint-8/{TENSORS} does not match {SUMS}",
    ),
    "another model": (_of_another_model, rf"{TENSORS} is of another model: layer '.*' is not in both"),
    "another checkpoint's": (
        _side_file_of("checkpoint-4"),
        rf"{STATE_RECORD} does not match {SUMS}: .* of another save",
    ),
    "another adapter": (lambda f: _edit(f / STATE_RECORD, adapter="second"), "of adapter 'second', not"),
    "other settings": (
        lambda f: _edit(
            f / STATE_RECORD, config={**json.loads((f / STATE_RECORD).read_text())["config"], "orth_weight": 0.25}
        ),
        r"other rank settings \(orth_weight 0.25 -> 0.0\); resume with the same",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_training_does_not_go_on_without_its_side_file(damage, stopped, make_trainer, quick):
    spoil, message = DAMAGE[damage]
    folder = stopped / "checkpoint-8"
    spoil(folder)
    trainer, _ = make_trainer(stopped, quick(min_rank=0, moves=7), **EVERY_4)
    with pytest.raises(ValueError, match=f"{message}.*ranks cannot go on without it; resume from a whole checkpoint"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_what_trainer_loaded_is_resumed_and_no_namesake(make_trainer, quick, tmp_path, run_state, assert_equal):
    """Two runs with a checkpoint-8 each: the one given to `train` counts, not the one in the output folder."""
    config = quick(min_rank=0, moves=7)
    first, callback = make_trainer(tmp_path / "one", config, save_strategy="steps", save_steps=8)
    first.train()
    whole = run_state(first, callback)
    other, _ = make_trainer(tmp_path / "two", config, save_strategy="steps", save_steps=8, learning_rate=0.3)
    other.train()
    trainer, callback = make_trainer(tmp_path / "two", config)
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8"))
    assert_equal(run_state(trainer, callback), whole)


# Writing


def test_a_write_that_meets_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_trainer_has_loaded_and_is_damaged_is_refused_with_the_checkpoint_to_take(stopped, make_trainer, quick):
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        folder = shutil.copytree(stopped / "checkpoint-4", stopped / "checkpoint-10")
        shutil.copy(stopped / "checkpoint-8" / name, folder)
        trainer, _ = make_trainer(stopped, quick(min_rank=0, moves=7))
        with pytest.raises(ValueError, match=rf"{name} does not match {SUMS}.*resume from .*checkpoint-12, which is w"):
            trainer.train(resume_from_checkpoint=str(folder))
        shutil.rmtree(folder)


def test_missing_random_numbers_are_told(stopped, make_trainer, quick):
    (stopped / "checkpoint-8" / "rng_state.pth").unlink()
    trainer, _ = make_trainer(stopped, quick(min_rank=0, moves=7))
    with pytest.warns(UserWarning, match="checkpoint-8/rng_state.pth is missing: this is no exact resume"):
        trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-8"))


def test_factors_that_were_loaded_in_another_precision_are_told(make_net, train_net, tmp_path, caplog):
    model = make_net(trained=True).to(torch.bfloat16)  # as TRL's Trainers have it on a quantised base
    checkpoint.save_state(allocate(model, forced(**SCHEDULE)), tmp_path)
    with caplog.at_level("WARNING", logger="pedyra"):
        checkpoint.restore(allocate(make_net(trained=True), forced(**SCHEDULE)), tmp_path)  # as PEFT loads it
    assert "the saved factors are in torch.bfloat16, and PEFT has loaded them in torch.float32" in caplog.text


def test_a_checkpoint_between_reading_and_stepping_keeps_what_was_observed(make_net, train_net, net_batch, tmp_path):
    """Trainer's enable_jit_checkpoint saves where a signal finds it."""
    model = make_net(trained=True)
    allocator = allocate(model, forced(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, 10)
    assert allocator.run.observes(11)

    def read(allocator, model):
        x, y = net_batch(11)
        (model(x) - y).square().mean().backward()
        allocator.before_step()
        return allocator.run.tensors()["sensitivity"].clone()

    before = read(allocator, model)
    checkpoint.save_state(allocator, tmp_path)
    again = make_net(trained=True).train()
    resumed = allocate(again, forced(**SCHEDULE))
    checkpoint.restore(resumed, tmp_path)
    after = read(resumed, again)
    # The averages of ten steps and more, and not of one alone: a step of theirs has 0.15 of its own value.
    assert after.norm() > 0.8 * before.norm()


def test_a_run_that_is_made_longer_is_told_and_its_scores_begin_anew(make_net, train_net, net_batch, tmp_path):
    """Its new schedule may look at the step before, which the old one did not: what is known is of long ago."""
    model = make_net(trained=True)
    allocator = allocate(model, forced(**SCHEDULE))
    train_net(model, allocator.optimizer, allocator, STEPS)
    checkpoint.save_state(allocator, tmp_path)
    assert allocator.schedule.adjustments[-1] == 20 and not allocator.run.observes(STEPS)
    longer = make_net(trained=True).train()
    resumed = allocate(longer, forced(**SCHEDULE), total_steps=2 * STEPS)
    assert resumed.run.observes(STEPS)
    told = rf"the run has 60 steps, and had 30 when {re.escape(str(tmp_path))} was saved: .* next .* follows step 32"
    with pytest.warns(UserWarning, match=told):
        checkpoint.restore(resumed, tmp_path)
    x, y = net_batch(STEPS + 1)
    (longer(x) - y).square().mean().backward()
    A = resumed.layers[0].a.A
    resumed.before_step()
    assert A.grad is not None
    expected = (A * A.grad).abs().flatten() * (1 - 0.85)
    assert torch.allclose(resumed.run.tensors()["sensitivity"][: A.numel()], expected, rtol=1e-5)
