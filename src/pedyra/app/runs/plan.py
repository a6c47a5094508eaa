"""What a run will do, worked out and checked before it does it: layers, budget, steps, adjustments, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.runs.setup import Setup, trainable_parameters
from pedyra.lora.layer import adapted_layers


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
    """Classes of the head; None for a regression, a causal LM and planted problems."""
    total_steps: int
    budget: dict[str, Any] | None
    """RankAllocator.describe()'s budget; None if the method keeps every rank."""
    schedule: dict[str, Any] | None
    memory: MemoryEstimate

    def rows(self) -> list[dict[str, Any]]:
        """The plan as one row, then one row per layer."""
        own = ("name", "method", "output_dir", "trainable_parameters", "total_parameters")
        own = (*own, "train_rows", "eval_rows", "classes")
        schedule = self.schedule or {"adjustments": [], "moves": 0}
        budget = self.budget["kind"] if self.budget else None
        plan = {
            "plan": self.name,
            **{key: getattr(self, key) for key in (*own[1:], "total_steps")},
            "layers": len(self.layers),
            "total_rank": sum(layer["rank"] for layer in self.layers),
            "budget": budget,
            "adjustments": len(schedule["adjustments"]),
            "moves": schedule.get("moves"),  # None of a method that cuts to a size
            "memory_bytes": self.memory.total,
        }
        return [plan, *self.layers]


def make_plan(setup: Setup) -> Plan:
    """Check the whole run against its data and model, and work out the plan; nothing stays on disk.

    A rank-adaptive method leaves its triples attached, as training would start with them.

    Raises:
        ValueError: rows longer than the model's positions, no batches or steps, or what RankAllocator refuses.
    """
    _check_positions(setup)
    with TemporaryDirectory() as folder:  # Trainer makes its output folder, and a plan must leave none behind
        trainer = setup.trainer(folder)
        _check_batches(trainer)
        total_steps = count_steps(trainer)
        budget = schedule = None
        ranks = setup.ranks
        if ranks is not None:
            optimizer = trainer.create_optimizer() or trainer.optimizer
            assert optimizer is not None
            allocator = RankAllocator(setup.model, optimizer, ranks.config, total_steps)
            description = allocator.describe()
            budget, schedule = description["budget"], description["schedule"]
            allocator.release()
        memory = estimate_memory(trainer)
    return Plan(
        name=setup.recipe.name,
        method=setup.recipe.method,
        output_dir=setup.recipe.output_dir,
        layers=lora_layers(setup.model),
        trainable_parameters=trainable_parameters(setup.model),
        total_parameters=sum(parameter.numel() for parameter in setup.model.parameters()),
        train_rows=len(setup.task.train),
        eval_rows=len(setup.task.eval),
        classes=setup.task.num_labels if setup.task.kind in ("classification", "pairs") else None,
        total_steps=total_steps,
        budget=budget,
        schedule=schedule,
        memory=memory,
    )


def _check_batches(trainer: Trainer) -> None:
    """With `dataloader_drop_last` the rows may be fewer than one batch, of which Trainer makes a run without steps."""
    sizes = (
        ("training", trainer.get_train_dataloader(), "per_device_train_batch_size", trainer.args.train_batch_size),
        ("held-out", trainer.get_eval_dataloader(), "per_device_eval_batch_size", trainer.args.eval_batch_size),
    )
    for side, loader, setting, size in sizes:
        if not len(loader):
            raise ValueError(
                f"training.dataloader_drop_last leaves no {side} batch: the rows are fewer than {size}; lower "
                f"training.{setting}"
            )


def lora_layers(model: nn.Module, adapter_name: str = "default") -> list[dict[str, Any]]:
    """Layer name, rank and trained parameters of every LoRA layer; empty for an adapter of another kind.

    Parameters that several layers share (RaSA's pools) are counted at the first.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with_triples = {layer.name: layer.rank for layer in adapted_layers(model, adapter_name)}
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            layer: Any = module
            own = {
                id(parameter): parameter.numel()
                for path, parameter in layer.named_parameters()
                if "lora_" in path and adapter_name in path.split(".") and parameter.requires_grad
            }
            parameters = sum(count for key, count in own.items() if key not in seen)
            seen |= own.keys()
            rank = with_triples.get(name, module.r[adapter_name])
            found.append({"layer": name, "rank": rank, "parameters": parameters})
    return found


def count_steps(trainer: Trainer) -> int:
    """Optimizer steps of the run, by Trainer's own rule."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = math.ceil(args.num_train_epochs * per_epoch)
    if steps < 1:
        raise ValueError(f"training.num_train_epochs is {args.num_train_epochs}; a run has at least one step")
    return steps


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
    rows: Any = trainer.train_dataset
    lengths = _tokens(rows)
    longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])[: trainer.args.train_batch_size]
    batch = trainer.data_collator([rows[index] for index in longest])
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


def _check_positions(setup: Setup) -> None:
    """A learned table of positions has an end; a longer row would fail in the middle of the run."""
    base = setup.model.get_base_model()
    endings = ("position_embeddings", "embed_positions", "wpe")
    tables: list[Any] = [module for name, module in base.named_modules() if name.endswith(endings)]
    limit = getattr(base.config, "max_position_embeddings", None)
    if not tables or limit is None:
        return
    # RoBERTa and its kin count positions from the padding's on; others make a table that is as much longer.
    whole = [table for table in tables if isinstance(table, nn.Embedding) and table.num_embeddings == limit]
    limit -= max((table.padding_idx + 1 for table in whole if table.padding_idx is not None), default=0)
    longest = max(max(_tokens(rows)) for rows in (setup.task.train, setup.task.eval))
    if longest > limit:
        raise ValueError(
            f"a row has {longest} tokens, but the model has {limit} positions; set data.max_length to {limit} or less"
        )


def _tokens(rows: Dataset) -> list[int]:
    """Tokens of each row, 1 for a vector. Counted in Arrow: row by row, 60,000 rows take five seconds."""
    if "input_ids" not in rows.column_names:
        return [1] * len(rows)
    table: Any = rows.with_format("arrow")[:]
    return [length for chunk in table["input_ids"].chunks for length in chunk.value_lengths().to_pylist()]
