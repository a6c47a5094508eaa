"""A plan says what a run will do: the run is set up and begun, and stopped before its first step."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import last_checkpoint
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import layer_rows, set_up, trainable_parameters


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run as it would be trained."""

    row: dict[str, Any]
    """The whole run in numbers.

    `trainable_parameters`: factors, and a head or other modules trained in full; `classes`: of the head, None for any
    other task; `budget`: its kind, None if the method keeps every rank; `moves`: None of a method that cuts to a size.
    """
    layers: list[dict[str, Any]]
    """Per adapted layer: layer (its name), rank, parameters (of its factors)."""
    budget: dict[str, Any] | None
    """RankAllocator.describe()'s budget; None if the method keeps every rank."""
    schedule: dict[str, Any] | None

    def rows(self) -> list[dict[str, Any]]:
        """Return the plan as one row, then one row per layer."""
        return [self.row, *self.layers]


def plan_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Plan:
    """Begin the run as Trainer begins it, and read the plan off it; nothing is trained or stays on the disk.

    Raises:
        ValueError: whatever would stop the run before its first step.
    """
    folder = RunFolder(Path(recipe.output_dir))
    folder.check(overwrite=overwrite, resume=resume)
    if resume:
        last_checkpoint(folder, recipe)
    setup, begun = set_up(recipe), _StopAtBegin()
    with TemporaryDirectory() as scratch:  # Trainer makes its output folder
        trainer, ranks = setup.training(scratch, [begun], report_to="none")
        with suppress(_StopAtBegin.Begun):
            trainer.train()
    allocator = None if ranks is None else ranks.allocator
    recipe, task, layers = setup.recipe, setup.task, layer_rows(setup.model)
    description = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
    budget, schedule = description["budget"], description["schedule"]
    row = {
        "plan": recipe.name,
        "method": recipe.method,
        "output_dir": recipe.output_dir,
        "trainable_parameters": trainable_parameters(setup.model),
        "total_parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "train_rows": len(task.train),
        "eval_rows": len(task.eval),
        "classes": task.num_labels if task.kind in ("classification", "pairs") else None,
        "total_steps": begun.total_steps,
        "layers": len(layers),
        "total_rank": sum(layer["rank"] for layer in layers),
        "budget": budget["kind"] if budget else None,
        "adjustments": len(schedule["adjustments"]) if schedule else 0,
        "moves": schedule.get("moves") if schedule else 0,
    }
    return Plan(row=row, layers=layers, budget=budget, schedule=schedule)


class _StopAtBegin(TrainerCallback):
    """It ends a training before its first step, once the method has begun."""

    total_steps = 0

    class Begun(Exception):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        self.total_steps = state.max_steps
        raise self.Begun
