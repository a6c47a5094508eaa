"""From a recipe to everything a Trainer takes: data, adapted model, arguments, and the method's rank settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, set_seed

from pedyra.config import RankConfig
from pedyra.models import load_model, load_tokenizer, lora_config
from pedyra.recipe import Recipe
from pedyra.runs.arguments import training_arguments
from pedyra.tasks import Task, load_task

METHODS = ("lora", "pedyra", "pedyra-paper")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run, ready to be planned and trained. The model is the only part that training changes."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    task: Task
    model: PeftModel
    rank_config: RankConfig | None
    """None: the method keeps every rank as it is."""

    def trainer(self, output_dir: str, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        """A Trainer of this run that writes to `output_dir` and draws nothing on the screen itself."""
        # Trainer cannot see through PEFT which input is the label.
        overrides: dict[str, Any] = {"output_dir": output_dir, "disable_tqdm": True, "label_names": ["labels"]}
        training = self.recipe.training
        best = training.get("load_best_model_at_end") or training.get("save_strategy") == "best"
        if best and "metric_for_best_model" not in training:
            overrides["metric_for_best_model"] = f"eval_{self.task.metric}"
            overrides["greater_is_better"] = self.task.greater_is_better
        trainer = Trainer(
            model=self.model,
            args=training_arguments(self.recipe, **overrides),
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
            **self.task.trainer_arguments(),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def set_up(recipe: Recipe) -> Setup:
    """Load data and model, and wrap the model in the recipe's LoRA.

    The seed is set before the head is drawn and again before the adapter is, so that both, and the order of the
    data, are equal for every method.

    Raises:
        ValueError: an unknown method, data or model that cannot be had, target modules that match nothing.
    """
    rank_config = rank_settings(recipe)
    training_arguments(recipe)  # a misspelt argument is told before the data is read
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed)
    base = load_model(recipe.model, recipe.data.kind, task.num_labels, tokenizer, recipe.seed)
    config = lora_config(recipe.lora, recipe.data.kind)
    check_targets(base, config)
    set_seed(recipe.seed)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return Setup(recipe=recipe, tokenizer=tokenizer, task=task, model=model, rank_config=rank_config)


def rank_settings(recipe: Recipe) -> RankConfig | None:
    """The RankConfig of the recipe's method: "pedyra" is our default, "pedyra-paper" the paper, "lora" none.

    Raises:
        ValueError: an unknown method, with the nearest known one.
    """
    if recipe.method not in METHODS:
        near = get_close_matches(recipe.method, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS)}"
        raise ValueError(f"method {recipe.method!r} is unknown; {hint}")
    if recipe.method == "lora":
        return None
    return (
        RankConfig.paper(**{"seed": recipe.seed, **recipe.rank}) if "paper" in recipe.method else recipe.rank_config()
    )


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuse target modules of which any matches nothing; PEFT overlooks a misspelt one among others.

    Raises:
        ValueError: with the names that could have been meant.
    """
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unmatched = [t for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unmatched:
        raise ValueError(
            f"lora.target_modules: {unmatched[0]!r} matches no module of the model; "
            f"candidates: {', '.join(_linear_names(model))}"
        )


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers, in the model's order; heads come last and are PEFT's to train."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear))


def trainable_parameters(model: nn.Module) -> int:
    """Parameters that training changes, now: triples and whatever else is unfrozen, such as a head."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
