"""A plan says what a run will do: the run is set up and begun, and stopped before its first step.

Where its base is not loaded, the plan is read off the model's config, on torch's meta device, where tensors have shapes
but no numbers. So a plan of any size fits on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from transformers import TrainerCallback

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.models.base import load_tokenizer, positions, shape_of
from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.run import last_checkpoint
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import (
    Setup,
    check_base,
    check_fit,
    layer_rows,
    request,
    resolve,
    run_steps,
    set_up,
    trainable_parameters,
    widen_heads,
)
from pedyra.app.tasks.task import load_task
from pedyra.app.tasks.test_sets import load_test_sets
from pedyra.errors import UserError
from pedyra.methods.loop import Loop
from pedyra.methods.registry import get_method
from pedyra.methods.trainer import check_arguments

BITS = {"none": None, "nf4": 4.127, "int8": 8.0}
"""A quantised weight has so many bits; a 4-bit one has its part of the scales, which are quantised too."""


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
    `activations`: what one forward pass over the longest batch keeps for the backward pass, measured where
    the weights were loaded.
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
    tensors = [*setup.model.parameters(), *setup.model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    activations = _kept_bytes(setup.model, forward)
    return _read_plan(setup, allocator, begun.total_steps, weights, activations)


class _StopAtBegin(TrainerCallback):
    """Ends a training before its first step, once the method has begun."""

    total_steps = 0

    class Begun(Exception):
        pass

    def on_train_begin(self, args, state, control, **kwargs):
        self.total_steps = state.max_steps
        raise self.Begun


def plan_unloaded(recipe: Recipe, *, overwrite: bool = False) -> Plan:
    """The plan, of the model's config and the rows alone: no weight is read, and activations are not counted.

    Raises:
        ValueError: what would stop the run, as far as it can be known, or a method that looks at the weights.
    """
    RunFolder(Path(recipe.output_dir)).check(overwrite=overwrite, resume=False)
    recipe = resolve(recipe)
    arguments = training_arguments(recipe)
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    test_sets = load_test_sets(recipe.generate, recipe.data, tokenizer, task.held_out, recipe.seed)
    with torch.device("meta"):
        base = shape_of(recipe.model, recipe.data.kind, task.num_labels, tokenizer)
        check_base(recipe, base, tokenizer, task, test_sets)
        try:
            adaptation = get_method(recipe.method).prepare(request(recipe, base, task))
        except RuntimeError as error:  # NotImplementedError is one
            raise UserError(
                f"method {recipe.method} looks at the model's weights before it trains, so nothing can be planned "
                f"without them: leave --no-weights out"
            ) from error
        widen_heads(arguments, adaptation.model)
        check_arguments(adaptation.refused, arguments)
        trained = [parameter for parameter in adaptation.model.parameters() if parameter.requires_grad]
        steps = run_steps(len(task.train), recipe)
        allocator = Loop(adaptation, torch.optim.SGD(trained), steps).allocator  # refuses what the run would
        setup = Setup(recipe=recipe, tokenizer=tokenizer, task=task, adaptation=adaptation)
        check_fit(setup)
        return _read_plan(setup, allocator, steps, _weights(adaptation.model, BITS[recipe.model.quantization]))


def _weights(model: nn.Module, bits: float | None) -> int:
    """Bytes of all that the model holds; with `bits`, its frozen linear layers but the head have so many a weight."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if bits is None:
        return total
    frozen = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and "lora_" not in name
        if not name.endswith(("lm_head", "score", "classifier", "qa_outputs"))
    ]
    return total - sum(math.floor(w.numel() * (w.element_size() - bits / 8)) for w in frozen)


def _read_plan(
    setup: Setup, allocator: RankAllocator | None, total_steps: int, weights: int, activations: int | None = None
) -> Plan:
    """The plan of a run whose model is adapted, and whose bytes of weights are known."""
    recipe, task, layers = setup.recipe, setup.task, layer_rows(setup.model)
    description = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
    budget, schedule = description["budget"], description["schedule"]
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    memory = {
        "weights": weights,
        "gradients_and_optimizer": 3 * sum(p.numel() * p.element_size() for p in trained),
        **({} if activations is None else {"activations": activations}),
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
        "total_steps": total_steps,
        "layers": len(layers),
        "total_rank": sum(layer["rank"] for layer in layers),
        "budget": budget["kind"] if budget else None,
        "adjustments": len(schedule["adjustments"]) if schedule else 0,
        "moves": schedule.get("moves") if schedule else 0,
        "memory_bytes": sum(memory.values()),
    }
    return Plan(row=row, layers=layers, budget=budget, schedule=schedule, memory=memory)


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
