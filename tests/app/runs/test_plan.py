"""plan_run: what it foretells is what training does."""

from typing import Any

import pytest

from pedyra.app.recipe import Recipe
from pedyra.app.runs.plan import plan_run
from pedyra.app.runs.setup import set_up

RANK = {
    **{"interval": 2, "initial_warmup": 1, "final_warmup": 3, "moves": 3},
    **{"min_rank": 1, "start": "lora", "orth_weight": 0.0, "budget": "parameters"},
}


def recipe(folder, method="lora", **training) -> Any:
    content = {
        "name": "toy",
        "output_dir": str(folder / "run"),
        "method": {"name": method, **(RANK if method != "lora" else {})},
        "model": {"name": "tiny-bert"},
        "data": {"source": "toy", "max_length": 40, "train_rows": 30, "eval_rows": 8},
        "lora": {"r": 4},
        "training": {
            **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
            "use_cpu": True,
            "save_strategy": "no",
            **training,
        },
    }
    return Recipe.model_validate(content)


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
    asked = recipe(tmp_path, eval_strategy="no", **training)
    trainer = set_up(asked).trainer(str(tmp_path))
    trainer.train()
    assert plan_run(asked)[0]["total_steps"] == trainer.state.global_step


def test_budget_and_adjustments_are_the_allocators(tmp_path):
    run, *layers = plan_run(recipe(tmp_path, "pedyra", max_steps=12))
    assert (run["budget"], run["adjustments"], run["moves"]) == ("parameters", 3, 3)  # after steps 3, 5 and 7
    assert run["total_rank"] == sum(layer["rank"] for layer in layers) == 52
