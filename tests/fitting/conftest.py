"""A Trainer that has trained a tiny classifier, in two seconds; each test has its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from classifier_rows import accuracy, rows


@pytest.fixture(scope="session")
def _trained() -> dict[str, Any]:
    """Settings of LoraConfig -> the state of the model that was trained with them, for all tests."""
    return {}


@pytest.fixture
def make_trainer(make_bert: Callable[..., Any], tmp_path: Any, _trained: dict[str, Any]) -> Callable[..., Any]:
    """make_trainer(kind, lora=..., given=..., **TrainingArguments): a trained classifier and its Trainer.

    given: of its arguments. trains: or not yet.
    """
    from transformers import Trainer, TrainingArguments

    def make(kind: Any = Trainer, *, lora: Any = None, trains: bool = True, given: Any = None, **settings: Any) -> Any:
        args = TrainingArguments(
            str(tmp_path / "trainer"),
            **{
                "max_steps": 50,
                "per_device_train_batch_size": 16,
                "learning_rate": 2e-2,
                "use_cpu": True,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": 20,
                "disable_tqdm": True,
                "label_names": ["labels"],
                **settings,
            },
        )
        lora = {"r": 4, "lora_alpha": 8, "task_type": None, **(lora or {})}
        model = make_bert(**lora)
        if lora["task_type"] is None:  # the head stays as it was drawn, so the adapter has to win everything
            model.get_base_model().classifier.weight.data.mul_(20)
        given = {
            "train_dataset": rows(512, 1),
            "eval_dataset": rows(96, 2),
            "compute_metrics": accuracy,
            **(given or {}),
        }
        trainer = kind(model, args, **given)
        key = repr(sorted(lora.items()))
        if trains and key not in _trained:
            Trainer(model, args, train_dataset=rows(512, 1)).train()
            _trained[key] = copy.deepcopy(model.state_dict())
        elif trains:
            model.load_state_dict(_trained[key])
        return trainer

    return make
