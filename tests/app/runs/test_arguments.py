"""A recipe's `training` section reaches TrainingArguments by name, and its mistakes are told at once."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import training_arguments


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {"name": "r", "seed": 4, "model": {"name": "m"}, "data": {"source": "toy"}, "training": training}
    )


def test_names_pass_through_with_the_recipes_folder_and_seed():
    arguments = training_arguments(recipe(learning_rate=0.5, max_steps="7", optim="sgd"))
    assert (arguments.output_dir, arguments.seed) == ("runs/r", 4)
    assert (arguments.learning_rate, arguments.max_steps, arguments.optim) == (0.5, 7, "sgd")
    assert arguments.per_device_train_batch_size == 16  # our default
    assert arguments.report_to == []


def test_overrides_win():
    assert training_arguments(recipe(max_steps=7), max_steps=9, output_dir="elsewhere").max_steps == 9


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"learning_rat": 1}, "training.learning_rat is no argument of .*; did you mean 'learning_rate'"),
        ({"qqqqqq": 1}, "training.qqqqqq is no argument of .*; see the documentation"),
        ({"max_steps": "many"}, "training.max_steps is 'many': Input should be a valid integer"),
        ({"learning_rate": None}, "training.learning_rate is None: Input should be a valid number"),
        ({"weight_decay": ".nan"}, "training.weight_decay is '.nan': Input should be a valid number"),
        ({"learning_rate": float("nan")}, "training.learning_rate is nan: Input should be a finite number"),
        ({"metric_for_best_model": "eval_bleu"}, "is 'eval_bleu'; this task has loss, accuracy, f1, matthews"),
        ({"eval_strategy": "often"}, "training: often is not a valid IntervalStrategy"),
        ({"eval_strategy": "no", "load_best_model_at_end": True}, "training: .*requires the save and eval strategy"),
    ],
)
def test_a_mistake_is_one_line(training: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told) as caught:
        training_arguments(recipe(**training))
    assert "\n" not in str(caught.value)
