"""What a run will do, read off the run itself: it is set up and begun, and stopped before its first step."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from pedyra.app.runs.setup import Setup, layer_rows, trainable_parameters


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes training holds at its fullest moment, without what the framework itself needs."""

    weights: int
    gradients_and_optimizer: int
    """One gradient and, as in Adam, two moments per trainable parameter."""
    activations: int
    """What one forward pass over the longest batch keeps for the backward pass, measured."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients_and_optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run as it would be trained."""

    name: str
    method: str
    output_dir: str
    layers: list[dict[str, Any]]
    """Per adapted layer: layer (its name), rank, parameters (of its factors)."""
    trainable_parameters: int
    """Factors, and a head or other modules trained in full."""
    total_parameters: int
    train_rows: int
    eval_rows: int
    classes: int | None
    """Classes of the head; None for any other task."""
    total_steps: int
    budget: dict[str, Any] | None
    """RankAllocator.describe()'s budget; None if the method keeps every rank."""
    schedule: dict[str, Any] | None
    memory: MemoryEstimate
    exchanged: dict[str, int] | None = None
    """Bytes that several processes average: "gradients" in a step, "observed" beside them in one that the method
    observes. None: not reckoned."""

    def rows(self) -> list[dict[str, Any]]:
        """The plan as one row, then one row per layer."""
        own = ("method", "output_dir", "trainable_parameters", "total_parameters", "train_rows", "eval_rows", "classes")
        schedule = self.schedule or {"adjustments": [], "moves": 0}
        plan = {
            "plan": self.name,
            **{key: getattr(self, key) for key in (*own, "total_steps")},
            "layers": len(self.layers),
            "total_rank": sum(layer["rank"] for layer in self.layers),
            "budget": self.budget["kind"] if self.budget else None,
            "adjustments": len(schedule["adjustments"]),
            "moves": schedule.get("moves"),  # None of a method that cuts to a size
            "memory_bytes": self.memory.total,
            **{f"{what}_bytes": count for what, count in (self.exchanged or {}).items()},
        }
        return [plan, *self.layers]


def make_plan(setup: Setup) -> Plan:
    """Begin the run of `setup` as Trainer begins it, and read the plan off it; nothing is trained or stays on disk.

    Raises:
        ValueError: what would stop the run before its first step.
    """
    begun = _StopAtBegin()
    with TemporaryDirectory() as folder:  # Trainer makes its output folder
        trainer = setup.trainer(folder, [*setup.callbacks, begun], report_to="none")
        with suppress(_StopAtBegin.Begun):
            trainer.train()
    allocator = None if setup.ranks is None else setup.ranks.allocator
    description = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
    return Plan(
        name=setup.recipe.name,
        method=setup.recipe.method,
        output_dir=setup.recipe.output_dir,
        layers=layer_rows(setup.model),
        trainable_parameters=trainable_parameters(setup.model),
        total_parameters=sum(parameter.numel() for parameter in setup.model.parameters()),
        train_rows=len(setup.task.train),
        eval_rows=len(setup.task.eval),
        classes=setup.task.num_labels if setup.task.kind in ("classification", "pairs") else None,
        total_steps=begun.total_steps,
        budget=description["budget"],
        schedule=description["schedule"],
        memory=estimate_memory(trainer),
    )


class _StopAtBegin(TrainerCallback):
    """Ends a training before its first step, once the method has begun."""

    total_steps = 0

    class Begun(Exception):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        self.total_steps = state.max_steps
        raise self.Begun


def estimate_memory(trainer: Trainer) -> MemoryEstimate:
    """Weights and states counted from the model, activations measured on the longest batch of the training data."""
    model = trainer.model
    assert model is not None
    tensors = [*model.parameters(), *model.buffers()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return MemoryEstimate(
        weights=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        gradients_and_optimizer=3 * sum(p.numel() * p.element_size() for p in trainable),
        activations=_measure_activations(trainer, model),
    )


def _measure_activations(trainer: Trainer, model: nn.Module) -> int:
    batch = trainer.data_collator(longest_rows(trainer.train_dataset, trainer.args.train_batch_size))
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with trainer.compute_loss_context_manager(), torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        trainer.compute_loss(model, batch)
    return sum(kept.values())


def longest_rows(rows: Any, count: int) -> list[Any]:
    """So many rows of a data set, those with the most tokens."""
    # Counted in Arrow: row by row, 60,000 rows take five seconds.
    chunks = rows.with_format("arrow")[:]["input_ids"].chunks
    lengths = [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]
    return [rows[index] for index in sorted(range(len(lengths)), key=lambda index: -lengths[index])[:count]]
