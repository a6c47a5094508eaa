"""Batches go forwards and backwards once, and every LoRA layer of a model shows what its directions do to the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn

from pedyra.errors import UserError
from pedyra.fitting.balance import Balance, balance, in_basis
from pedyra.fitting.gramians import Gramians, Sums
from pedyra.fitting.judge import Batch, Judge
from pedyra.fitting.modes import evaluating, frozen, unpack
from pedyra.fitting.repair import mixings
from pedyra.lora.layer import peft_layers
from pedyra.lora.supported import check_supported, kind_of_module


@dataclass(frozen=True)
class Directions:
    """The directions of one layer, as calibrated."""

    basis: Balance
    products: Float[Tensor, "blocks r r"]
    """T K T^-1 of each block of batches: the diagonal is the slope of every direction's gate, and the rest that of
    mixing one direction into another."""
    parameters: int
    """Of one direction: a row of A and a column of B."""

    @property
    def rank(self) -> int:
        return self.products.shape[-1]

    @property
    def slopes(self) -> Float[Tensor, "blocks r"]:
        """Return the slope of every direction's gate."""
        return self.products.diagonal(dim1=1, dim2=2)


@dataclass(frozen=True)
class Calibration:
    """The directions of all layers, as calibrated."""

    layers: dict[str, Directions]
    samples: Float[Tensor, " blocks"]
    repairs: bool = True
    """Whether what is kept makes up for what is removed."""

    def mixed(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """Return, for each layer, I + M `(k, k)` of its first `ranks[name]` directions, which make up for what is
        removed."""
        if not self.repairs or all(ranks[name] == layer.rank for name, layer in self.layers.items()):
            return {name: torch.eye(ranks[name]).double() for name in self.layers}
        products = {name: layer.products for name, layer in self.layers.items()}
        result = mixings(products, self.samples, ranks)
        return {name: torch.eye(len(M)).double() + M for name, M in result.items()}


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Find PEFT's LoraLayer, by its name in the base model, for every linear layer that holds the adapter. Raises
    ValueError: no such adapter, or a layer (embedding, convolution, AdaLoRA's) that a fit does not take."""
    result = {layer.name: layer.module for layer in peft_layers(model, adapter)}
    if not result:
        raise UserError(f"the model has no LoRA adapter named {adapter!r}; load one, or pass its name")
    kinds = {name: kind for name, module in result.items() if (kind := kind_of_module(module, adapter))}
    configs: Any = getattr(model, "peft_config", {})  # one that is wrapped for several processes has none
    kind_of_adapter = {"peft_type": configs[adapter].peft_type} if adapter in configs else {}
    check_supported("fit", f"adapter {adapter!r}", kind_of_adapter, kinds)
    return result


def does_something(layer: Any, adapter: str = "default") -> bool:
    """Tell whether a LoRA layer changes what its base layer says: in no direction whose column of B is zero, as LoRA
    begins, or whose row of A is, as a triple with E = 0."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return bool((A.any(1) & B.any(0)).any())


def calibrate(judge: Judge, batches: Iterable[Batch], *, adapter: str = "default") -> Calibration:
    """Send each batch forwards and backwards, in evaluation mode; no weight and no gradient of the model changes.

    The processes of accelerate have other batches, as many each, and the same result.

    Raises:
        ValueError: fewer than two batches have a finite loss; a layer was not seen.
    """
    gramians = gramians_of(judge, batches, adapter)
    sums, samples = gramians.totals()
    if len(samples) < 2:
        total = sum(gather_object([gramians.batches]))
        raise UserError(
            f"{len(samples)} of {total} calibration batches have a finite loss, and it takes two; give more rows"
        )
    layers = lora_layers(judge.model, adapter)
    _check_seen(sums, layers, adapter, set(gather_object([*gramians.active])))
    result = {}
    for name, module in layers.items():
        P, Q, K, tokens = sums[name]
        basis = balance(P / max(tokens, 1e-3), Q / max(tokens, 1e-3))
        A, B = (slot[adapter].weight for slot in (module.lora_A, module.lora_B))
        result[name] = Directions(basis, in_basis(K, basis), A.shape[1] + B.shape[0])
    return Calibration(result, samples)


def gramians_of(judge: Judge, batches: Iterable[Batch], adapter: str = "default") -> Gramians:
    """Send each batch forwards and backwards, and sum what the slots of all layers see."""
    slots = {name: module.lora_A[adapter] for name, module in lora_layers(judge.model, adapter).items()}
    gramians = Gramians({name: slot.weight for name, slot in slots.items()})
    unpack(judge.model)
    with evaluating(judge.model, checkpointing=True), frozen(judge.model), _reading(slots, gramians):
        for batch in batches:
            value = judge.trained_loss(batch)
            if value.requires_grad:
                value.backward()
            samples = torch.tensor(judge.samples(batch), device=value.device)
            gramians.close(torch.where(value.detach().isfinite(), samples, 0.0), judge.loss_scale)
    return gramians


def seconds_a_batch(judge: Judge, trained: Batch, heldout: Batch, adapter: str = "default") -> tuple[float, float]:
    """Time the calibration by the first, and the evaluation of the second with its metrics, each in a second pass. A
    held-out batch may have more rows than a backward pass has room for."""

    def second(act: Callable[[], Any]) -> float:
        act()
        began = time.perf_counter()
        act()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    whole = partial(evaluating, judge.model)
    return second(lambda: gramians_of(judge, [trained], adapter)), second(lambda: [*judge.losses([heldout], whole, [])])


def _check_seen(sums: Mapping[str, Sums], layers: Mapping[str, Any], adapter: str, active: set[str]) -> None:
    """Raise ValueError for a layer that does something and was not measured: its directions would seem worthless."""
    for name, module in layers.items():
        if sums[name].tokens or not does_something(module, adapter):
            continue
        if name in active:
            raise UserError(
                f"no gradient reached {name} in the calibration, although its adapter is not zero, so what its "
                f"directions are worth is unknown: the loss does not depend on it, or what computes it cuts the "
                f"gradient; load the adapter in plain PEFT with `pedyra fit FOLDER`, or leave the layer out of it"
            )
        raise UserError(
            f"the calibration saw no token in {name}, so what its directions are worth is unknown: a fused kernel "
            f"reads its weights and does not call it, or no token reached it (an expert); load the adapter in plain "
            f"PEFT with `pedyra fit FOLDER`, give more rows, or leave the layer out of the adapter"
        )


@contextmanager
def _reading(slots: Mapping[str, nn.Module], gramians: Gramians) -> Iterator[None]:
    """While it lasts, the output of each A slot and its gradient are summed."""

    def reader(name: str) -> Callable[..., Tensor]:
        observe = gramians.observer(name)

        def read(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return h
            gramians.active.add(name)
            if not h.requires_grad:
                h = h.detach().requires_grad_()
            activation = h.detach()  # a hook that held h itself would keep it alive
            h.register_hook(lambda g: observe(activation, g))
            return h

        return read

    handles = [slot.register_forward_hook(reader(name)) for name, slot in slots.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
