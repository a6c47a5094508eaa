"""What a run will do, read off the run itself: it is set up and begun, and stopped before its first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from transformers import TrainerCallback

from pedyra.allocate.rank_allocator import RankAllocator
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
    batch = trainer.data_collator(longest_rows(setup.task.train, trainer.args.train_batch_size))
    batch = {key: value.to(trainer.args.device) for key, value in batch.items()}

    def forward() -> None:
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(setup.model, batch)

    allocator = None if setup.ranks is None else setup.ranks.allocator
    tensors = [*setup.model.parameters(), *setup.model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    activations = kept_bytes(setup.model, forward)
    return read_plan(setup, allocator, begun.total_steps, weights, activations)


class _StopAtBegin(TrainerCallback):
    """Ends a training before its first step, once the method has begun."""

    total_steps = 0

    class Begun(Exception):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        self.total_steps = state.max_steps
        raise self.Begun


def read_plan(
    setup: Setup,
    allocator: RankAllocator | None,
    total_steps: int,
    weights: int,
    activations: int,
    exchanged: dict[str, int] | None = None,
) -> Plan:
    """The plan of a run whose model is adapted, and whose bytes of weights and of activations are known."""
    recipe, task, model = setup.recipe, setup.task, setup.model
    description = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Plan(
        name=recipe.name,
        method=recipe.method,
        output_dir=recipe.output_dir,
        layers=layer_rows(model),
        trainable_parameters=trainable_parameters(model),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_rows=len(task.train),
        eval_rows=len(task.eval),
        classes=task.num_labels if task.kind in ("classification", "pairs") else None,
        total_steps=total_steps,
        budget=description["budget"],
        schedule=description["schedule"],
        memory=MemoryEstimate(
            weights=weights,
            gradients_and_optimizer=3 * sum(p.numel() * p.element_size() for p in trained),
            activations=activations,
        ),
        exchanged=exchanged,
    )


def kept_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """What a forward pass in training keeps for the backward pass, beside the parameters."""
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


def longest_rows(rows: Any, count: int) -> list[Any]:
    """So many rows of a data set, those with the most tokens."""
    # Counted in Arrow: row by row, 60,000 rows take five seconds.
    chunks = rows.with_format("arrow")[:]["input_ids"].chunks
    lengths = [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]
    return [rows[index] for index in sorted(range(len(lengths)), key=lambda index: -lengths[index])[:count]]
