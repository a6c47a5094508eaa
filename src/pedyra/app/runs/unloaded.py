"""The plan of a run whose base is not loaded: made of its config, on torch's meta device, where tensors have shapes but
no numbers. So a plan of any size fits on any machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.contract import RankMethod
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.models import check_names, load_tokenizer, positions, shape_of
from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.plan import MemoryEstimate, Plan, longest_rows
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import (
    layer_rows,
    request,
    resolve,
    run_steps,
    trainable_parameters,
)
from pedyra.app.tasks import Task, load_task
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.registry import get_method
from pedyra.methods.wide import Wide
from pedyra.pe_dyra.scored import ScoredMethod

BITS = {"none": None, "nf4": 4.127, "int8": 8.0}
"""Of a weight that is quantised; of a 4-bit one with its part of the scales, which are quantised too."""


def plan_unloaded(recipe: Recipe, *, overwrite: bool = False) -> Plan:
    """The plan, of the model's config and the rows alone; nothing is read of weights, trained or written.

    Raises:
        ValueError: what would stop the run, as far as it can be known, or a method that looks at the weights.
    """
    RunFolder(Path(recipe.output_dir)).check(overwrite=overwrite, resume=False)
    recipe = resolve(recipe)
    arguments = training_arguments(recipe)
    tokenizer = load_tokenizer(recipe.model)
    task = load_task(recipe.data, tokenizer, recipe.seed, positions(recipe.model))
    with torch.device("meta"):
        base = shape_of(recipe.model, recipe.data.kind, task.num_labels, len(tokenizer))
        check_names(base, recipe.lora)
        try:
            adaptation = get_method(recipe.method).prepare(request(recipe, base, task))
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"method {recipe.method} looks at the model's weights before it trains, so nothing can be planned "
                f"without them: leave --no-weights out"
            ) from error
        model, steps = adaptation.model, run_steps(len(task.train), recipe)
        allocator = None
        if adaptation.ranks is not None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            allocator = RankAllocator(model, torch.optim.SGD(trained), adaptation.ranks, steps)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        described = {"budget": None, "schedule": None} if allocator is None else allocator.describe()
        if any(getattr(arguments, name, False) for name in ("activation_checkpointing", "gradient_checkpointing")):
            switch = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            switch({"use_reentrant": False})
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
            total_steps=steps,
            budget=described["budget"],
            schedule=described["schedule"],
            memory=MemoryEstimate(
                weights=_weights(model, BITS[recipe.model.quantization]),
                gradients_and_optimizer=3 * sum(p.numel() * p.element_size() for p in trained),
                activations=_activations(model, task, recipe.training["per_device_train_batch_size"]),
            ),
            exchanged={
                "gradients": sum(p.numel() * p.element_size() for p in trained),
                "observed": 0 if allocator is None else _observed(allocator.layers, allocator.method),
            },
        )


def _weights(model: nn.Module, bits: float | None) -> int:
    """Bytes of all that the model holds; with `bits`, of a base whose linear layers but the head are quantised."""
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


def _activations(model: Any, task: Task, rows: int) -> int:
    """What a forward pass over the longest batch keeps for the backward pass.

    The mask is left out, since transformers looks at its numbers; a decoder, which would then look at those of the
    positions, is given the whole one.
    """
    with torch.device("cpu"):
        batch = task.collator(longest_rows(task.train, rows))
    batch = {key: value.to("meta") for key, value in batch.items() if key != "attention_mask"}
    if task.kind == "causal_lm":
        count, length = batch["input_ids"].shape
        batch["attention_mask"] = torch.ones(count, 1, length, length, dtype=torch.bool)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}  # the storages themselves: an address that is free again would be another's

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def _observed(layers: list[AdaptedLayer], method: RankMethod) -> int:
    """Bytes that several processes average, beside gradients, in a step that the method observes; see
    docs/processes.md."""
    if isinstance(method, Wide):
        return 4 * (1 + sum(3 * layer.rank**2 + 1 for layer in layers))
    reads_inputs = isinstance(method, ScoredMethod) and method.alpha < 1 and method.scores is None
    return 4 * sum(layer.a.in_features + 1 for layer in layers) if reads_inputs else 0
