"""A pass over some batches that measures every LoRA layer of a model: Gramians, and gate slopes batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pedyra.fit.worth import Balance, balance, gate_slopes
from pedyra.lora.layer import rank_parameters

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""The mean loss of a batch."""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model gives for a batch with labels."""
    return model(**batch).loss


def num_samples(batch: Batch) -> int:
    """What the mean loss of a batch is a mean over: its rows, or the tokens that have a label."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] != -100).sum()) or 1
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


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


@dataclass
class LayerSums:
    """Sums of one layer over the batches so far; in float32, where the layer is."""

    P: Tensor
    """Sum of h h^T `(r, r)` over the tokens whose gradient is not zero: padding has none."""
    Q: Tensor
    """Sum of g g^T `(r, r)`, of the loss of one sample."""
    tokens: Tensor
    K: list[Tensor] = field(default_factory=list)
    """Per batch the sum of h g^T `(r, r)`, of the batch's mean loss."""
    open: Tensor | None = None
    """K of the batch that is running."""

    def add(self, h: Tensor, g: Tensor, samples: int) -> None:
        """The tokens of one call: h and g `(..., r)`, g of the batch's mean loss."""
        h, g = h.detach().flatten(0, -2).float(), g.detach().flatten(0, -2).float()
        counts = (g != 0).any(-1, keepdim=True)
        h = h * counts
        K = h.T @ g
        self.open = K if self.open is None else self.open + K
        self.P += h.T @ h
        self.Q += (g.T @ g) * float(samples) ** 2
        self.tokens += counts.sum()


@dataclass(frozen=True)
class Measured:
    """What a calibration knows of one layer."""

    basis: Balance
    slopes: Tensor
    """(batches, r): of every direction's gate."""
    tokens_per_sample: float
    price: int
    """Parameters of one direction."""

    @property
    def rank(self) -> int:
        return len(self.basis.values)


@dataclass(frozen=True)
class Calibration:
    """What a calibration pass measured."""

    layers: dict[str, Measured]
    samples: Tensor
    """(batches,): samples of each."""
    loss: float
    """Mean over samples."""
    skipped: int
    """Batches left out, whose loss or slopes were not finite."""


def calibrate(
    model: nn.Module, batches: Iterable[Batch], *, adapter: str = "default", loss: Loss = model_loss
) -> Calibration:
    """One forward and backward pass per batch, in evaluation mode; no weight and no gradient of the model changes.

    Raises:
        ValueError: no batch, or none whose loss is finite.
    """
    layers = lora_layers(model, adapter)
    sums = {name: _empty(module.lora_A[adapter]) for name, module in layers.items()}
    kept: list[tuple[int, float]] = []
    skipped, total = 0, 0
    with _evaluating(model), _frozen(model):
        for batch in batches:
            samples, total = num_samples(batch), total + 1
            before = {name: (s.P.clone(), s.Q.clone(), s.tokens.clone()) for name, s in sums.items()}
            with _reading(layers, adapter, sums, samples):
                value = loss(model, batch)
                if value.requires_grad:
                    value.backward()
            found = [s.open for s in sums.values() if s.open is not None]
            if not value.isfinite() or not all(K.isfinite().all() for K in found):
                skipped += 1
                for name, s in sums.items():
                    s.P, s.Q, s.tokens = before[name]
                    s.open = None
                continue
            for s in sums.values():
                s.K.append(torch.zeros_like(s.P) if s.open is None else s.open)
                s.open = None
            kept.append((samples, float(value.detach())))
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {total} calibration batches have a finite loss, and it takes two; give more")
    counts = torch.tensor([float(samples) for samples, _ in kept]).double()
    mean = sum(samples * value for samples, value in kept) / float(counts.sum())
    measured = {name: _measure(sums[name], layers[name], adapter, float(counts.sum())) for name in layers}
    return Calibration(measured, counts, mean, skipped)


def _empty(slot: Any) -> LayerSums:
    rank, device = slot.weight.shape[0], slot.weight.device
    return LayerSums(torch.zeros(rank, rank, device=device), torch.zeros(rank, rank, device=device),
                     torch.zeros((), device=device))  # fmt: skip


def _measure(sums: LayerSums, module: Any, adapter: str, samples: float) -> Measured:
    tokens = float(sums.tokens)
    basis = balance(sums.P.cpu() / max(1.0, tokens), sums.Q.cpu() / max(1.0, tokens))
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return Measured(
        basis, gate_slopes(torch.stack(sums.K).cpu(), basis), tokens / samples, rank_parameters(A.shape[1], B.shape[0])
    )


@contextmanager
def _reading(layers: dict[str, Any], adapter: str, sums: dict[str, LayerSums], samples: int) -> Iterator[None]:
    """While it lasts, what the A slots give is a leaf of the graph, and its gradient is added up with it."""

    def reader(name: str) -> Callable[..., Tensor]:
        def read(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return h
            if not h.requires_grad:
                h = h.detach().requires_grad_()
            h.register_hook(lambda g: sums[name].add(h, g, samples))
            return h

        return read

    handles = [module.lora_A[adapter].register_forward_hook(reader(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
    handles = []
    for name, module in lora_layers(model, adapter).items():
        measured = calibration.layers[name]
        if ranks[name] == measured.rank:
            continue
        handles.append(module.lora_A[adapter].register_forward_hook(_projecting(measured.basis, ranks[name])))
    try:
        with _evaluating(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _projecting(basis: Balance, rank: int) -> Callable[..., Tensor]:
    projection = basis.inverse[:, :rank] @ basis.T[:rank]  # h -> the part of h along the kept directions

    def project(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        return (h.float() @ projection.T.to(h.device, torch.float32)).to(h.dtype)

    return project
