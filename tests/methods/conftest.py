"""Short runs of any method on a tiny model, and the situations that policies decide in."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer

from pedyra.allocate.contract import Beginning, Work
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.schedule import Schedule
from pedyra.allocate.scored import ScoredSituation
from pedyra.app.models.base import load_model, load_tokenizer
from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.setup import begin_method, resolve
from pedyra.app.tasks.task import Task, load_task
from pedyra.methods.names import setting_names
from pedyra.methods.registry import get_method
from pedyra.trainer.adapt import MethodTraining, adapt

# Trainer collects garbage before every run; without this, through all that the imports made.
gc.freeze()

KINDS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "classification"},
    "causal_lm": {"kind": "causal_lm", "prompt": "prompt", "completion": "completion"},
}
MODELS = {"causal_lm": "tiny-llama"}
SCHEDULE = {"interval": 2, "initial_warmup": 2, "final_warmup": 3}
"""Adjustments at steps 4, 6 and 8 of 12."""


@dataclass
class Run:
    """A method on a model, before or after its training."""

    recipe: Recipe
    task: Task
    model: Any
    trainer: Trainer
    handle: MethodTraining | None

    @property
    def work(self) -> Any:
        return Work() if self.handle is None else self.handle.work

    @property
    def allocator(self) -> RankAllocator:
        assert self.handle is not None and self.handle.allocator is not None
        return self.handle.allocator

    def train(self) -> Run:
        self.trainer.train()
        return self

    def batch(self, rows: int = 8) -> dict[str, torch.Tensor]:
        return dict(self.task.collator([self.task.train[index] for index in range(rows)]))

    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch without its labels: PEFT's AdaLoRA, loaded for inference, fails on a loss."""
        return {name: value for name, value in self.batch().items() if name != "labels"}

    def logits(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(**self.inputs()).logits

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return those of one batch, by the name of the parameter, of the adapter alone."""
        self.model.train()
        self.model.zero_grad()
        self.model(**self.batch()).loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and "lora" in name
        }


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """make_recipe(method, kind="classification", budget=4, settings={...}, **sections): 12 steps on toy sentences.

    It has the size of a LoRA of r = 4, alpha = 32; with a `final_rank` in the settings it begins with that LoRA."""

    def make(
        method: str, kind: str = "classification", *, budget: int = 4, settings: Any = None, **sections: Any
    ) -> Recipe:
        settings = {key: SCHEDULE[key] for key in SCHEDULE if key in setting_names(method)} | (settings or {})
        beginning = Beginning(budget) if "final_rank" in settings else get_method(method).at_budget(budget)
        training = {
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 4,
            "save_strategy": "no",
            "eval_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        content: dict[str, Any] = {
            "name": "test",
            "method": {"name": method, **beginning.settings, **settings},
            "output_dir": str(tmp_path / "run"),
            "model": {"name": MODELS.get(kind, "tiny-bert"), **sections.get("model", {})},
            "data": {"source": "toy", "max_length": 48, "train_rows": 48, "eval_rows": 16, **KINDS[kind]},
            "lora": {"r": beginning.r, "alpha": 8 * budget * beginning.alpha, **sections.get("lora", {})},
            "training": {**training, **sections.get("training", {})},
        }
        return resolve(Recipe.model_validate(content))

    return make


@pytest.fixture
def make_base() -> Callable[[Recipe], tuple[Any, Task, Any]]:
    """make_base(recipe): the base model, the task and the tokenizer."""

    def make(recipe: Recipe) -> tuple[Any, Task, Any]:
        tokenizer = load_tokenizer(recipe.model)
        task = load_task(recipe.data, tokenizer, recipe.seed)
        return load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed), task, tokenizer

    return make


@pytest.fixture
def prepare(make_recipe: Any, make_base: Any) -> Callable[..., Run]:
    """prepare(method, kind="classification", **sections): everything up to the first step."""

    def make(method: str, kind: str = "classification", **sections: Any) -> Run:
        recipe = make_recipe(method, kind, **sections)
        base, task, tokenizer = make_base(recipe)
        model, own = begin_method(recipe, base)
        trainer = Trainer(
            model=model,
            args=training_arguments(recipe),
            processing_class=tokenizer,
            **task.trainer_arguments(),
        )
        handle = None if own is None else adapt(trainer, own)
        trainer.remove_callback(PrinterCallback)
        return Run(recipe, task, model, trainer, handle)

    return make


@pytest.fixture
def situation() -> Callable[..., ScoredSituation]:
    """situation(ranks, **changes): the adjustment at step 4 of 20 (t_i = 2, interval 2, t_f = 5: at 4, 6, ..., 14)."""

    def make(ranks: dict[str, int], **changes: Any) -> ScoredSituation:
        schedule = Schedule(total_steps=20, initial_warmup=2, interval=2, final_warmup=5)
        settings: dict[str, Any] = dict(
            step=4,
            schedule=schedule,
            history=[],
            ranks=ranks,
            initial_ranks=ranks,
            moves=1,
            min_rank=1,
            max_ranks=dict.fromkeys(ranks, 100),
            parameters=dict.fromkeys(ranks, 10),
            spare=0,
            budget="ranks",
        )
        return ScoredSituation(**{**settings, **changes})

    return make
