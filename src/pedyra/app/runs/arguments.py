"""The `training` section of a recipe becomes transformers.TrainingArguments."""

from __future__ import annotations

import os
from typing import Any, get_args, get_type_hints

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import METRICS
from pedyra.app.runs.processes import count_processes, is_launched
from pedyra.errors import REFUSALS, UserError, telling
from pedyra.lora.spelling import did_you_mean
from pedyra.trainer.engines import why_not_fsdp2

PLAIN = {int, float, bool, str, type(None)}
"""Values of these types are checked; the others are names and mappings, which TrainingArguments checks itself."""


LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}


def training_arguments(recipe: Recipe, **overrides: Any) -> TrainingArguments:
    """Make TrainingArguments of a recipe: its `training` section, output_dir and seed, then `overrides`.

    `fsdp` is for processes that a launcher has started, and is left out in a process by itself.

    Raises ValueError for a name TrainingArguments does not have (with the nearest one), a value of another type,
    whatever TrainingArguments refuses itself, and an engine under which no run trains.
    """
    _check_best(recipe)
    _check_smoothing(recipe)
    _check_deepspeed(recipe)
    settings = {
        # Pinning without an accelerator does nothing but warn.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,  # a loss that is no number is shown as it is, not as 0
        # Without it each of several processes on a CPU would train alone, and write into the same folder.
        "use_cpu": is_launched() and not torch.accelerator.is_available(),
        **_checked(recipe.training),
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        **overrides,
    }
    if not is_launched():
        settings.pop("fsdp", None)
    with telling("training", KeyError, *REFUSALS):
        arguments = TrainingArguments(**settings)
        get_reporting_integration_callbacks(arguments.report_to)  # refuses an unknown name, as Trainer does much later
    absent = set(arguments.report_to or ()) - set(get_available_reporting_integrations())
    if absent:
        raise UserError(f"training.report_to: {min(absent)} is not installed; install it, or leave it out")
    if arguments.world_size != count_processes():
        raise UserError(
            f"accelerate takes this for one of {arguments.world_size} processes, and {count_processes()} were started; "
            f"set training.use_cpu to true, or start one"
        )
    _check_fsdp(recipe, arguments)
    return arguments


def _checked(training: dict[str, Any]) -> dict[str, Any]:
    """Read numbers as numbers: TrainingArguments checks no types, and fails long after the start."""
    types = get_type_hints(TrainingArguments)
    checked = {}
    for name, value in training.items():
        if name.startswith("_") or name not in types:
            hint = did_you_mean(name, types, otherwise="see the documentation of transformers.TrainingArguments")
            raise UserError(f"training.{name} is no argument of transformers.TrainingArguments; {hint}")
        members = set(get_args(types[name])) or {types[name]}
        try:
            plain = members <= PLAIN and name != "fsdp"  # which is said to be text, and takes true
            checked[name] = TypeAdapter(types[name]).validate_python(value) if plain else value
        except ValidationError as error:
            raise UserError(f"training.{name} is {value!r}: {error.errors()[0]['msg']}") from None
        _check_meaning(name, checked[name])
    return checked


def _check_meaning(name: str, value: Any) -> None:
    """Refuse what TrainingArguments takes, and a run would not mean."""
    if name in LEAST and value < LEAST[name]:
        raise UserError(f"training.{name} is {value}; it is at least {LEAST[name]}")
    if name == "num_train_epochs" and value <= 0:
        raise UserError(f"training.num_train_epochs is {value}; it is above 0, and a run has at least one step")
    if name == "max_steps" and value < 1 and value != -1:
        raise UserError(f"training.max_steps is {value}; a run has at least one step (-1: those of num_train_epochs)")
    if name == "prediction_loss_only" and value:
        raise UserError("training.prediction_loss_only is on, but a run is judged by its metric; leave it out")
    if name == "accelerator_config" and isinstance(value, dict) and not value.get("use_seedable_sampler", True):
        raise UserError(
            "training.accelerator_config.use_seedable_sampler is off, and a resume could not go on in the order of the "
            "rows; leave it out"
        )


def _is_set_by_accelerate(engine: str) -> bool:
    """Tell whether `accelerate launch` has been told to use this engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() == "true"


def _check_deepspeed(recipe: Recipe) -> None:
    """Refuse DeepSpeed before TrainingArguments looks for a package that may not be there."""
    if recipe.training.get("deepspeed") or _is_set_by_accelerate("deepspeed"):
        raise UserError(
            "training.deepspeed: a run of pedyra trains under DDP, FSDP2 or in one process; with DeepSpeed train in a "
            "Trainer of your own, and give pedyra fit the adapter's folder"
        )


def asks_for_fsdp(recipe: Recipe) -> bool:
    """Tell whether the recipe or `accelerate launch` asks that the base model be cut over the processes."""
    return bool(recipe.training.get("fsdp")) or (is_launched() and _is_set_by_accelerate("fsdp"))


def _check_fsdp(recipe: Recipe, arguments: TrainingArguments) -> None:
    if not (is_launched() and asks_for_fsdp(recipe)):
        return
    given: dict[str, Any] = arguments.fsdp_plugin_args or {}  # else accelerate takes all of them from the environment
    if int(given.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")) == 1:
        raise UserError(
            "training.fsdp: a run of pedyra trains under FSDP2, not under FSDP1; set training.fsdp_config.version to "
            "2, or in a launch --fsdp_version 2"
        )
    with telling("training.fsdp_config: accelerate does not take it", KeyError, *REFUSALS):
        plugin = FullyShardedDataParallelPlugin(**given)
    if (flaw := why_not_fsdp2(plugin, arguments)) is not None:
        raise UserError(f"training.fsdp: a run of pedyra does not train under FSDP2 with {flaw}")


def _check_smoothing(recipe: Recipe) -> None:
    """Trainer smooths the labels of a class or a token, and fails in training, or does nothing, with others."""
    factor, kind = recipe.training.get("label_smoothing_factor"), recipe.data.kind
    if factor and kind in ("regression", "seq2seq", "question_answering"):
        raise UserError(f"training.label_smoothing_factor is {factor}, but data.kind {kind} takes none; leave it out")


def _check_best(recipe: Recipe) -> None:
    """A metric that no evaluation gives would fail at the first one."""
    wanted, known = recipe.training.get("metric_for_best_model"), ("loss", *METRICS[recipe.data.kind])
    if wanted is not None and str(wanted).removeprefix("eval_") not in known:
        raise UserError(f"training.metric_for_best_model is {wanted!r}; this task has {', '.join(known)}")
