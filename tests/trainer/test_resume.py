"""resume_from_checkpoint continues the run as if it had never stopped, bit for bit."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper": {"rank": {"paper": True}},
    "rank 0 allowed": {"rank": {"min_rank": 0, "moves": 12}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "DoRA": {"lora": {"use_dora": True}},
    "PiSSA": {"lora": {"init_lora_weights": "pissa"}},
    "PiSSA, SVD start": {"lora": {"init_lora_weights": "pissa"}, "rank": {"start": "svd"}},
    "rsLoRA": {"lora": {"use_rslora": True}},
    "accumulation": {"arguments": {"gradient_accumulation_steps": 2}},
    "activation checkpointing": {"arguments": {"activation_checkpointing": True}},
    "reentrant checkpointing": {
        "arguments": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    },
    "SGD with momentum": {"arguments": {"optim": "sgd", "optim_args": "momentum=0.9"}},
    "no clipping": {"arguments": {"max_grad_norm": 0.0}},
    "bf16 autocast": {"arguments": {"bf16": True}},
}


class StopAfter(TrainerCallback):
    """Ends a run early without shortening its schedule, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.fixture
def run(make_trainer: Any, quick: Any):
    def go(out, variant: str, *, resume_at: int | None = None, stop_after: int | None = None):
        settings = VARIANTS[variant]
        trainer, callback = make_trainer(
            out,
            quick(**settings.get("rank", {})),
            lora=settings.get("lora"),
            **{"save_strategy": "steps", "save_steps": 1, **settings.get("arguments", {})},
        )
        if stop_after is not None:
            trainer.add_callback(StopAfter(stop_after))
        trainer.train(resume_from_checkpoint=None if resume_at is None else str(out / f"checkpoint-{resume_at}"))
        return trainer, callback

    return go


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_the_unbroken_one(variant, run, tmp_path, run_state, assert_equal):
    """Resumed one step before an adjustment, on it, one step after it, and after the last."""
    unbroken = run_state(*run(tmp_path / "whole", variant))
    assert [record["step"] for record in unbroken["history"]] == [3, 5, 7]
    assert any(record["pruned"] for record in unbroken["history"]), "nothing moved: the test would prove nothing"
    for step in (4, 5, 6, 8) if variant == "plain" else (5,):
        again = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", again / f"checkpoint-{step}")
        assert_equal(run_state(*run(again, variant, resume_at=step)), unbroken)


def test_a_run_that_is_resumed_from_its_very_last_step_takes_none_more(run, tmp_path, run_state, assert_equal):
    """Step 12 is in the middle of the second epoch, where Trainer by itself would go on to step 13."""
    unbroken = run_state(*run(tmp_path, "plain"))
    again = run(tmp_path, "plain", resume_at=12)
    assert again[0].state.global_step == 12
    assert_equal(run_state(*again), unbroken)


def test_several_resumes_in_a_row(run, tmp_path, run_state, assert_equal):
    unbroken = run_state(*run(tmp_path / "whole", "plain"))
    out = tmp_path / "pieces"
    run(out, "plain", stop_after=3)
    run(out, "plain", resume_at=3, stop_after=4)
    run(out, "plain", resume_at=4, stop_after=7)
    assert_equal(run_state(*run(out, "plain", resume_at=7)), unbroken)


def test_a_model_that_trainer_makes_itself_is_resumed(make_bert, make_trainer, tmp_path, run_state, assert_equal):
    """`model_init`: `train` makes another model than the callback saw first, and loads the checkpoint into it."""

    class Making(Trainer):
        def __init__(self, model: Any, **arguments: Any) -> None:
            super().__init__(model_init=lambda: make_bert(), **arguments)

    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=4, trainer_class=Making)
    whole[0].train()
    assert any(record["pruned"] for record in whole[1].allocator.history)
    again = make_trainer(tmp_path / "again", trainer_class=Making)
    again[0].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal(run_state(*again), run_state(*whole))


def test_resuming_in_the_same_trainer_equals_the_first_run(make_trainer, tmp_path, run_state, assert_equal):
    """A notebook's second cell: train() again from a checkpoint, with the optimizer of the first run still there."""
    trainer, callback = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    first = run_state(trainer, callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(run_state(trainer, callback), first)
