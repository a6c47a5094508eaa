"""The `training` section of a recipe as transformers.TrainingArguments."""

from __future__ import annotations

import math
import os
from typing import Any, get_args, get_type_hints

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import METRICS
from pedyra.app.runs.processes import count_processes, is_launched
from pedyra.lora.spelling import did_you_mean
from pedyra.trainer.engines import why_not_fsdp2

PLAIN = {int, float, bool, str, type(None)}
"""Types whose values are checked; the others are names and mappings that TrainingArguments checks itself."""


LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 1,
    "learning_rate": 0,
    "label_smoothing_factor": 0,
}
"""Argument -> its least value: what TrainingArguments lets pass, and fails on later."""


MAPPINGS = ("accelerator_config", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
"""Arguments that TrainingArguments says may be a text or anything else, and that a recipe writes as keys."""


def training_arguments(recipe: Recipe, **overrides: Any) -> TrainingArguments:
    """TrainingArguments of a recipe: its `training` section, output_dir and seed, then `overrides`.

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
    try:
        arguments = TrainingArguments(**settings)
        get_reporting_integration_callbacks(arguments.report_to)  # refuses an unknown name, as Trainer does much later
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    untold = {"flyte", "azure_ml"}  # which that list leaves out though they are there
    absent = set(arguments.report_to or ()) - set(get_available_reporting_integrations()) - untold
    if absent:
        raise ValueError(f"training.report_to: {min(absent)} is not installed; install it, or leave it out")
    if arguments.world_size != count_processes():
        raise ValueError(
            f"accelerate takes this for one of {arguments.world_size} processes, and {count_processes()} were started; "
            f"set training.use_cpu to true, or start one"
        )
    _check_fsdp(recipe, arguments)
    _check_scheduler(arguments)
    return arguments


def _checked(training: dict[str, Any]) -> dict[str, Any]:
    """The settings with numbers as numbers: TrainingArguments checks no types, and fails long after the start."""
    types = get_type_hints(TrainingArguments)
    checked = {}
    for name, value in training.items():
        if name.startswith("_") or name not in types:
            hint = did_you_mean(name, types, otherwise="see the documentation of transformers.TrainingArguments")
            raise ValueError(f"training.{name} is no argument of transformers.TrainingArguments; {hint}")
        members = set(get_args(types[name])) or {types[name]}
        try:
            plain = members <= PLAIN and name != "fsdp"  # which is said to be text, and takes true
            checked[name] = TypeAdapter(types[name]).validate_python(value) if plain else value
        except ValidationError as error:
            raise ValueError(f"training.{name} is {value!r}: {error.errors()[0]['msg']}") from None
        _check_range(name, checked[name])
    return checked


def _check_range(name: str, value: Any) -> None:
    _check_mapping(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"training.{name} is {value}; it must be a finite number")
    if isinstance(value, (int, float)) and value < LEAST.get(name, value):
        raise ValueError(f"training.{name} is {value}; it is at least {LEAST[name]}")
    if name == "label_smoothing_factor" and value >= 1:
        raise ValueError(f"training.label_smoothing_factor is {value}; it is below 1, for 1 leaves nothing of a label")
    if name == "num_train_epochs" and value <= 0:
        raise ValueError(f"training.num_train_epochs is {value}; it is above 0, and a run has at least one step")
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"training.max_steps is {value}; a run has at least one step (-1: those of num_train_epochs)")
    if name == "label_names" and value is not None:
        raise ValueError(f"training.label_names is {value!r}, but a run's task says what its labels are; leave it out")
    if name == "optim_args" and value and not all(part.count("=") == 1 for part in str(value).split(",")):
        raise ValueError(f"training.optim_args is {value!r}; give name=value, and several with commas between them")
    if name == "eval_do_concat_batches" and not value:
        raise ValueError("training.eval_do_concat_batches is off, but metrics are of all rows together; leave it out")
    if name == "prediction_loss_only" and value:
        raise ValueError("training.prediction_loss_only is on, but a run is judged by its metric; leave it out")


def _check_mapping(name: str, value: Any) -> None:
    if value is None:
        return
    if name in MAPPINGS and not isinstance(value, dict):
        raise ValueError(f"training.{name} is {value!r}; it is a mapping of names to values")
    if name == "parallelism_config":
        raise ValueError(
            "training.parallelism_config is an object of accelerate, which a recipe cannot name; remove it"
        )
    if name == "accelerator_config" and not value.get("use_seedable_sampler", True):
        raise ValueError(
            "training.accelerator_config.use_seedable_sampler is off, and a resume could not go on in the order of the "
            "rows; leave it out"
        )


def _check_scheduler(arguments: TrainingArguments) -> None:
    """Make the schedule of the learning rate for an optimizer of nothing: it takes settings of its own."""
    optimizer, steps = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate), 100
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        kind, given = SchedulerType(arguments.lr_scheduler_type).value, arguments.lr_scheduler_kwargs
        settings = f" with training.lr_scheduler_kwargs {given}" if given else ""
        raise ValueError(f"training.lr_scheduler_type {kind}{settings}: {' '.join(str(error).split())}") from error


def _is_set_by_accelerate(engine: str) -> bool:
    """Whether `accelerate launch` has been told to use this engine."""
    return os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() == "true"


def _check_deepspeed(recipe: Recipe) -> None:
    """Told before TrainingArguments looks for a package that may not be there."""
    if recipe.training.get("deepspeed") or _is_set_by_accelerate("deepspeed"):
        raise ValueError(
            "training.deepspeed: a run of pedyra trains under DDP, FSDP2 or in one process; with DeepSpeed train in a "
            "Trainer of your own, and give pedyra fit the adapter's folder"
        )


def asks_for_fsdp(recipe: Recipe) -> bool:
    """Whether the recipe or `accelerate launch` asks that the base model be cut over the processes."""
    return bool(recipe.training.get("fsdp")) or (is_launched() and _is_set_by_accelerate("fsdp"))


def _check_fsdp(recipe: Recipe, arguments: TrainingArguments) -> None:
    if not (is_launched() and asks_for_fsdp(recipe)):
        return
    given: dict[str, Any] = arguments.fsdp_plugin_args or {}  # else accelerate takes all of them from the environment
    if int(given.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")) == 1:
        raise ValueError(
            "training.fsdp: a run of pedyra trains under FSDP2, not under FSDP1; set training.fsdp_config.version to "
            "2, or in a launch --fsdp_version 2"
        )
    try:
        flaw = why_not_fsdp2(FullyShardedDataParallelPlugin(**given), arguments)
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise ValueError(
            f"training.fsdp_config: accelerate does not take it: {' '.join(str(error).split())}"
        ) from error
    if flaw is not None:
        raise ValueError(f"training.fsdp: a run of pedyra does not train under FSDP2 with {flaw}")


def _check_smoothing(recipe: Recipe) -> None:
    """Trainer smooths the labels of a class or a token, and fails in training, or does nothing, with others."""
    factor, kind = recipe.training.get("label_smoothing_factor"), recipe.data.kind
    if factor and kind in ("regression", "seq2seq", "question_answering"):
        raise ValueError(f"training.label_smoothing_factor is {factor}, but data.kind {kind} takes none; leave it out")


def _check_best(recipe: Recipe) -> None:
    """A metric that no evaluation gives would fail at the first one."""
    wanted, known = recipe.training.get("metric_for_best_model"), ("loss", *METRICS[recipe.data.kind])
    if wanted is not None and str(wanted).removeprefix("eval_") not in known:
        raise ValueError(f"training.metric_for_best_model is {wanted!r}; this task has {', '.join(known)}")
