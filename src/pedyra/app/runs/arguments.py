"""The `training` section of a recipe becomes transformers.TrainingArguments."""

from __future__ import annotations

import os
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import METRICS
from pedyra.app.runs.processes import count_processes, is_launched
from pedyra.errors import REFUSALS, UserError, as_user_error
from pedyra.lora.spelling import did_you_mean


def training_arguments(recipe: Recipe, **overrides: Any) -> TrainingArguments:
    """Make TrainingArguments of a recipe: its `training` section, output_dir and seed, then `overrides`; without `fsdp`
    where no launcher has started the process."""
    settings = {
        # Pinning without an accelerator does nothing but warn.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,  # a NaN loss is logged as NaN, and not as 0
        # Without it several processes on a CPU would each train alone, and write into the same folder.
        "use_cpu": is_launched() and not torch.accelerator.is_available(),
        **_training_section(recipe),
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        **overrides,
    }
    if not is_launched():
        settings.pop("fsdp", None)
    with as_user_error("training", KeyError, *REFUSALS):
        arguments = TrainingArguments(**settings)
    if arguments.world_size != count_processes():
        raise UserError(
            f"accelerate takes this for one of {arguments.world_size} processes, and {count_processes()} were started; "
            f"set training.use_cpu to true, or start one"
        )
    return arguments


def _training_section(recipe: Recipe) -> dict[str, Any]:
    """Check names and types, because TrainingArguments checks no types and fails long after the start."""
    types = get_type_hints(TrainingArguments)
    arguments = {}
    for name, value in recipe.training.items():
        if name not in types:
            hint = did_you_mean(name, types, otherwise="see the documentation of transformers.TrainingArguments")
            raise UserError(f"training.{name} is no argument of transformers.TrainingArguments; {hint}")
        try:
            # Its annotation is text, but it takes true.
            kind = Any if name == "fsdp" else types[name]
            arguments[name] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            raise UserError(f"training.{name} is {value!r}: {error.errors()[0]['msg']}") from None
    best, metrics = arguments.get("metric_for_best_model"), ("loss", *METRICS[recipe.data.kind])
    if best is not None and best.removeprefix("eval_") not in metrics:  # or Trainer fails at the first evaluation
        raise UserError(f"training.metric_for_best_model is {best!r}; this task has {', '.join(metrics)}")
    return arguments


def asks_for_fsdp(recipe: Recipe) -> bool:
    """Tell whether the recipe or `accelerate launch` asks for FSDP."""
    launched = is_launched() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return launched or bool(recipe.training.get("fsdp"))
