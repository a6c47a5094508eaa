"""A plan says what a run will do: the run is set up and begun, and stopped before its first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from transformers import TrainerCallback

from pedyra.app.recipe import Recipe
from pedyra.app.runs.run import last_checkpoint
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import Setup, layer_rows, set_up, trainable_parameters


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
    memory: dict[str, int]
    """Bytes training holds at its fullest moment, without what the framework itself needs.

    `weights`; `gradients_and_optimizer`: one gradient and, as in Adam, two moments per trainable parameter;
    `activations`: what one forward pass over the longest batch keeps for the backward pass.
    """

    def rows(self) -> list[dict[str, Any]]:
        """The plan as one row, then one row per layer."""
        return [self.row, *self.layers]


def plan_run(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Plan:
    """Check everything `train_run` would check, and return the plan; nothing is trained or written.

    Raises:
        ValueError: whatever would stop the run.
    """
    folder = RunFolder(Path(recipe.output_dir))
    folder.check(overwrite=overwrite, resume=resume)
    if resume:
        last_checkpoint(folder, recipe)
    return make_plan(set_up(recipe))


def make_plan(setup: Setup) -> Plan:
    """Begin the run of `setup` as Trainer begins it, and read the plan off it; nothing is trained or stays on disk.

    Raises:
        ValueError: what would stop the run before its first step.
    """
    begun = _StopAtBegin()
    with TemporaryDirectory() as folder:  # Trainer makes its output folder
        trainer, ranks = setup.training(folder, [begun], report_to="none")
        with suppress(_StopAtBegin.Begun):
            trainer.train()
    batch = trainer.data_collator(_longest_rows(setup.task.train, trainer.args.train_batch_size))
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}

    def forward() -> None:
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(setup.model, batch)

    allocator = None if ranks is None else ranks.allocator
    recipe, task, layers = setup.recipe, setup.task, layer_rows(setup.model)
    description = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
    budget, schedule = description["budget"], description["schedule"]
    tensors = [*setup.model.parameters(), *setup.model.buffers()]
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    memory = {
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "gradients_and_optimizer": 3 * sum(p.numel() * p.element_size() for p in trained),
        "activations": _kept_bytes(setup.model, forward),
    }
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
        "memory_bytes": sum(memory.values()),
    }
    return Plan(row=row, layers=layers, budget=budget, schedule=schedule, memory=memory)


class _StopAtBegin(TrainerCallback):
    """Ends a training before its first step, once the method has begun."""

    total_steps = 0

    class Begun(Exception):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        self.total_steps = state.max_steps
        raise self.Begun


def _kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Measure what a forward pass in training keeps for the backward pass, beside the parameters."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, UntypedStorage] = {}  # the storages themselves: an address that is free again would be another's

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def _longest_rows(rows: Any, count: int) -> list[Any]:
    """Find so many rows of a data set, those with the most tokens."""
    # Counted in Arrow: row by row, 60,000 rows take five seconds.
    chunks = rows.with_format("arrow")[:]["input_ids"].chunks
    lengths = [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]
    return [rows[index] for index in sorted(range(len(lengths)), key=lambda index: -lengths[index])[:count]]
