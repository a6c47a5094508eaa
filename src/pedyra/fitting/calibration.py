"""A pass over some batches that measures every LoRA layer of a model: Gramians, and gate slopes batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pedyra.fitting.gramians import Calibration, Gramians
from pedyra.fitting.samples import num_samples
from pedyra.lora.layer import AdaptedLayer, rank_parameters
from pedyra.lora.observation import observed

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""The mean loss of a batch."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model gives for a batch with labels."""
    return model(**batch).loss


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Name in the base model -> PEFT's LoraLayer, for every linear layer that holds the adapter.

    Raises:
        ValueError: no such adapter, or a layer (embedding, convolution) whose directions are not measured.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = {}
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_embedding_A:
            raise ValueError(f"{name} is an embedding, whose directions are not measured; take it out of the adapter")
        if adapter in module.lora_A:
            if getattr(module.lora_A[adapter], "kernel_size", None) is not None:
                raise ValueError(f"{name} is a convolution, whose directions are not measured; take it out")
            found[name] = module
    if not found:
        raise ValueError(f"the model has no LoRA adapter named {adapter!r}; load one, or pass its name")
    return found


def calibrate(
    model: nn.Module, batches: Iterable[Batch], *, adapter: str = "default", loss: Loss = model_loss
) -> Calibration:
    """One forward and backward pass per batch, in evaluation mode; no weight and no gradient of the model changes.

    Raises:
        ValueError: no batch, or none whose loss is finite.
    """
    layers = lora_layers(model, adapter)
    slots = {name: module.lora_A[adapter] for name, module in layers.items()}
    gramians = Gramians({name: slot.weight for name, slot in slots.items()})
    total = 0
    with evaluating(model), _frozen(model), _reading(slots, gramians):
        for batch in batches:
            total += 1
            value = loss(model, batch)
            if value.requires_grad:
                value.backward()
            samples = num_samples(model, batch).to(value.device)
            gramians.close(torch.where(value.detach().isfinite(), samples, 0.0))
    prices = {
        name: rank_parameters(slots[name].weight.shape[1], module.lora_B[adapter].weight.shape[0])
        for name, module in layers.items()
    }
    found = gramians.calibration(prices) if total else None
    usable = 0 if found is None else len(found.samples)
    if found is None or usable < 2:
        raise ValueError(f"{usable} of {total} calibration batches have a finite loss, and it takes two; give more")
    return found


@contextmanager
def _reading(slots: Mapping[str, nn.Module], gramians: Gramians) -> Iterator[None]:
    """While it lasts, what the A slots give is a leaf of the graph, and is seen with its gradient."""

    def reader(name: str) -> Callable[..., Tensor]:
        observe = gramians.observer(name)

        def read(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return h
            if not h.requires_grad:
                h = h.detach().requires_grad_()
            return observed(h, observe)

        return read

    handles = [slot.register_forward_hook(reader(name)) for name, slot in slots.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, on in training.items():
            module.training = on


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def truncated(model: nn.Module, calibration: Calibration, ranks: Mapping[str, int], adapter: str = "default"):
    """While it lasts, each layer uses its first `ranks[name]` balanced directions alone; no weight changes."""
    layers = lora_layers(model, adapter)
    handles = [
        layers[name].lora_A[adapter].register_forward_hook(_projecting(projection))
        for name, projection in calibration.projections(ranks).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _projecting(projection: Tensor) -> Callable[..., Tensor]:
    def project(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        return (h.float() @ projection.T.to(h.device, torch.float32)).to(h.dtype)

    return project


@contextmanager
def projected(projections: Mapping[AdaptedLayer, Tensor]) -> Iterator[None]:
    """While it lasts, A of each layer is multiplied from the left by a projection `(r, r)`; then it is what it was.

    As `truncated`, for whatever forward a layer in training has.
    """
    before = [(layer.a.A, layer.a.A.detach().clone()) for layer in projections]
    with torch.no_grad():
        for (A, _), projection in zip(before, projections.values(), strict=True):
            A.copy_(projection.to(A.device, torch.float32) @ A.float())
        try:
            yield
        finally:
            for A, values in before:
                A.copy_(values)
