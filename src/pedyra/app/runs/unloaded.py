"""The plan of a run whose base is not loaded: made of its config, on torch's meta device, where tensors have shapes but
no numbers. So a plan of any size fits on any machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pedyra.allocate.contract import RankMethod
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.app.models import check_names, load_tokenizer, positions, shape_of
from pedyra.app.recipe import Recipe
from pedyra.app.runs.arguments import training_arguments
from pedyra.app.runs.plan import Plan, kept_bytes, longest_rows, read_plan
from pedyra.app.runs.run_folder import RunFolder
from pedyra.app.runs.setup import Setup, request, resolve, run_steps
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
        if any(getattr(arguments, name, False) for name in ("activation_checkpointing", "gradient_checkpointing")):
            switch = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            switch({"use_reentrant": False})
        weights = _weights(model, BITS[recipe.model.quantization])
        activations = _activations(model, task, recipe.training["per_device_train_batch_size"])
        exchanged = {
            "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
            "observed": 0 if allocator is None else _observed(allocator.layers, allocator.method),
        }
        setup = Setup(recipe=recipe, tokenizer=tokenizer, task=task, adaptation=adaptation)
        return read_plan(setup, allocator, steps, weights, activations, exchanged)


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
    return kept_bytes(model, lambda: model(**batch))


def _observed(layers: list[AdaptedLayer], method: RankMethod) -> int:
    """Bytes that several processes average, beside gradients, in a step that the method observes; see
    docs/processes.md."""
    if isinstance(method, Wide):
        return 4 * (1 + sum(3 * layer.rank**2 + 1 for layer in layers))
    reads_inputs = isinstance(method, ScoredMethod) and method.alpha < 1 and method.scores is None
    return 4 * sum(layer.a.in_features + 1 for layer in layers) if reads_inputs else 0
