"""A stopped run resumes by the same recipe, on the same rows, from a whole checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from pedyra.app.recipe import Recipe, identity
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.processes import count_processes
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.yaml_file import first_difference, read_settings
from pedyra.errors import UserError
from pedyra.methods.registry import get_method
from pedyra.trainer.checkpoint_folder import last_complete_checkpoint


def how_to_go_on(recipe: Recipe, folder: RunFolder) -> str:
    """Tell how to continue a run that has ended before its last step."""
    if why := why_not_resumable(recipe.method.name, recipe.training):
        return f"start it anew with --overwrite, for {why}"
    elsewhere = folder.path.absolute() != Path(recipe.output_dir).absolute()
    there = f" output_dir={shlex.quote(str(folder.path))}" if elsewhere else ""
    return f"continue with pedyra train {shlex.quote(str(folder.recipe))}{there} --resume"


def why_not_resumable(method: str, training: Mapping[str, Any]) -> str | None:
    """Tell why a run of this method with these arguments cannot go on from a checkpoint; None where it can."""
    if not get_method(method).resumable:
        return f"method {method} cannot continue from a checkpoint"
    if training.get("save_only_model"):
        return "training.save_only_model leaves the optimizer out of its checkpoints"
    if training.get("train_sampling_strategy") == "group_by_length":
        return "training.train_sampling_strategy group_by_length draws its order anew, and the rows would be others"
    return None


def last_checkpoint(folder: RunFolder, recipe: Recipe) -> tuple[Path, list[tuple[Path, str]]]:
    """Find the checkpoint to resume from, and the broken ones that are newer, with their flaws; refuse a run that would
    not go on as it began."""
    before = identity(read_settings(folder.recipe, [], what="recipe", starts_with="model"))
    now = identity(recipe.model_dump(mode="json"))
    for each in (before, now):
        each.pop("fit", None)  # asked when the run has ended
        each["training"] = {key: value for key, value in each["training"].items() if key not in SHARING}
    if difference := first_difference(before, now):
        raise UserError(
            f"--resume: {difference}; continue with the run's own recipe, {folder.recipe}, or start anew with "
            f"--overwrite"
        )
    if why := why_not_resumable(recipe.method.name, recipe.training):
        raise UserError(f"--resume: {why}; --overwrite starts anew")
    rows, here = folder.recorded("rows_per_step"), rows_per_step(training_arguments(recipe))
    if rows not in (None, here):
        raise UserError(
            f"--resume: a step of the run in {folder.path} has {rows} rows, and would have {here} in "
            f"{count_processes()} process(es); start as many as before, or set training.per_device_train_batch_size or "
            f"gradient_accumulation_steps so that it has {rows}"
        )
    return last_complete_checkpoint(folder.path, with_ranks=folder.ranks.is_file())


# Keys of `training` by which processes share the rows of a step; a resume may change them.
SHARING = ("per_device_train_batch_size", "gradient_accumulation_steps", "fsdp", "fsdp_config")


def rows_per_step(args: TrainingArguments) -> int:
    """Count the rows of an optimizer step, in all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
