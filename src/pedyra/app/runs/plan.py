"""A plan describes a run: the run is set up and started, and stopped before its first step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from pedyra.app.recipe import Recipe
from pedyra.app.runs.resume import last_checkpoint
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import layer_rows, set_up


def plan_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> list[dict[str, Any]]:
    """Start the run in a Trainer and read the plan from it; nothing is trained or saved.

    The first row is of the whole run, in which `budget` is None where the method keeps every rank; then each adapted
    layer has one: layer (its name), rank, parameters (of its factors).
    """
    folder = RunFolder(Path(recipe.output_dir))
    folder.check(overwrite=overwrite, resume=resume)
    if resume:
        last_checkpoint(folder, recipe)
    setup = set_up(recipe)
    with TemporaryDirectory() as scratch:  # Trainer makes its output folder
        trainer, handle = setup.training(scratch, [_StopAtBegin()], report_to="none")
        with suppress(_Begun):
            trainer.train()
    recipe, task, layers = setup.recipe, setup.task, layer_rows(setup.model)
    allocator = None if handle is None else handle.allocator
    description = {} if allocator is None else allocator.describe()
    budget, schedule = description.get("budget") or {}, description.get("schedule") or {}
    row = {
        "plan": recipe.name,
        "method": recipe.method.name,
        "output_dir": recipe.output_dir,
        "trainable_parameters": setup.model.get_nb_trainable_parameters()[0],
        "total_parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "train_rows": len(task.train),
        "eval_rows": len(task.eval),
        "classes": task.num_labels if task.kind in ("classification", "pairs") else None,
        "total_steps": trainer.state.max_steps,
        "layers": len(layers),
        "total_rank": sum(layer["rank"] for layer in layers),
        "budget": budget.get("kind"),
        "adjustments": schedule.get("adjustments", 0),
        "moves": schedule.get("moves"),
    }
    return [row, *layers]


class _Begun(Exception):
    """Ends a training before its first step, once the method has begun."""


class _StopAtBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise _Begun
