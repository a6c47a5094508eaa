"""Fit by `RankCallback` in a Trainer: classifiers and language models, accumulation, autocast, resume."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from pedyra import RankConfig

FIT: dict[str, Any] = {"budget": "fit", "interval": 10, "tolerance": 0.5, "initial_warmup": 10, "final_warmup": 10}
LONG: dict[str, Any] = {"max_steps": 50, "learning_rate": 2e-2, "per_device_train_batch_size": 8}


def states(callback: Any) -> list[str]:
    return [record["fit"]["state"] for record in callback.allocator.history]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"bf16": True}, {"max_grad_norm": 0.01}],
    ids=["plain", "accumulation", "bf16", "clipped"],
)
def test_a_classifier_is_fitted_in_a_trainer(arguments, make_trainer, tmp_path):
    trainer, callback = make_trainer(tmp_path, RankConfig(**FIT), **{**LONG, **arguments})
    trainer.train()
    assert "asking" in states(callback)
    (first, *_), last = callback.allocator.history, callback.allocator.history[-1]["fit"]
    assert first["fit"]["won"] is not None and last["batches"] >= 8
    for point in last["points"]:
        assert abs(point["measured_cost"]) < 5 and point["batches"] >= 8
    assert callback.allocator.parameters <= callback.allocator.initial_parameters


def test_a_language_model_is_fitted_in_a_trainer(make_trainer, make_llama, tmp_path, rows):
    """Whose loss Trainer divides by the labels of all micro-batches."""
    for row in rows:
        row["labels"] = row["input_ids"].clone()
    trainer, callback = make_trainer(
        tmp_path, RankConfig(**FIT), model=make_llama(r=4), **LONG, gradient_accumulation_steps=2
    )
    trainer.train()
    won, error = callback.allocator.history[-1]["fit"]["won"]
    assert won > 3 * error, "the rows are learned by heart"
    assert callback.allocator.history[-1]["fit"]["batches"] >= 8


@pytest.mark.parametrize("step", [15, 24])
def test_a_trainer_resumes_to_the_last_bit(step, make_trainer, tmp_path, run_state, assert_equal):
    def run(out: Any, resume: int | None = None) -> Any:
        trainer, callback = make_trainer(
            out, RankConfig(**FIT), **{**LONG, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 40}
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(out / f"checkpoint-{resume}"))
        return trainer, callback

    whole = run(tmp_path / "whole")
    assert "asking" in states(whole[1])
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", again / f"checkpoint-{step}")
    assert_equal(run_state(*run(again, step)), run_state(*whole))
