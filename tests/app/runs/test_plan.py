"""make_plan: what it foretells is what training does."""

from typing import Any

import pytest

from pedyra.app.recipe import Recipe
from pedyra.app.runs.plan import make_plan
from pedyra.app.runs.setup import run_steps, set_up

RANK = {
    **{"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3},
    **{"min_rank": 1, "start": "lora", "orth_weight": 0.0, "budget": "parameters"},
}


def set_up_toy(method="lora", rows=30, max_length=40, **training) -> Any:
    content = {
        "name": "toy",
        "method": method,
        "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": max_length, "train_rows": rows, "eval_rows": 8},
        "lora": {"r": 4},
        "rank": RANK if method != "lora" else {},
        "training": {
            **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
            "use_cpu": True,
            "save_strategy": "no",
            **training,
        },
    }
    return set_up(Recipe.model_validate(content))


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 5},
        {"num_train_epochs": 2},
        {"num_train_epochs": 1.3},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 1, "dataloader_drop_last": True},
    ],
)
def test_steps_are_those_trainer_takes(training, tmp_path):
    setup = set_up_toy(eval_strategy="no", **training)
    trainer = setup.trainer(str(tmp_path))
    trainer.train()
    planned = make_plan(set_up_toy(eval_strategy="no", **training)).row["total_steps"]
    assert planned == run_steps(30, setup.recipe) == trainer.state.global_step


def test_memory_counts_weights_and_adam_exactly_and_activations_by_size():
    setup = set_up_toy()
    memory = make_plan(setup).memory
    parameters = list(setup.model.parameters())
    buffers = list(setup.model.buffers())
    assert memory["weights"] == sum(4 * p.numel() for p in parameters) + sum(b.nbytes for b in buffers)
    assert memory["gradients_and_optimizer"] == 12 * sum(p.numel() for p in parameters if p.requires_grad)
    # At least the input of each of 13 linears, 4 rows of the longest length, width 64; at most 30 such tensors a block.
    one = 4 * max(len(ids) for ids in setup.task.train["input_ids"]) * 64 * 4
    assert 13 * one < memory["activations"] < 2 * 30 * one


def test_twice_the_batch_keeps_about_twice_the_activations():
    small, large = (
        make_plan(set_up_toy(rows=60, per_device_train_batch_size=size)).memory["activations"] for size in (8, 16)
    )
    assert 1.7 < large / small < 2.1


def test_budget_and_adjustments_are_the_allocators():
    plan = make_plan(set_up_toy("pedyra", max_steps=12))
    assert plan.budget == {
        "kind": "parameters",
        "total_rank": 52,
        "parameters": sum(r["parameters"] for r in plan.layers),
    }
    assert plan.schedule is not None and plan.schedule["adjustments"] == [3, 5, 7]
