"""Eq. (2) over all layers of an adapter: its gradient added to `.grad`, batched over factors of equal shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pedyra.allocate.batching import alike
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.orthogonality import orthogonality, orthogonality_gradient


@torch.no_grad()
def add_orthogonality_gradient(layers: Sequence[AdaptedLayer], *, weight: float, form: str) -> None:
    """grad += weight * d R_orth / d factor, with R_orth the mean over the 2 L matrices ("norm") or their sum."""
    factors = [layer.a.A for layer in layers if layer.rank] + [layer.b.weight for layer in layers if layer.rank]
    count = len(layers)
    scale = weight / (2 * count) if form == "norm" else weight
    rows = [factor if index < len(factors) // 2 else factor.T for index, factor in enumerate(factors)]
    for indices in alike(tuple(row.shape) for row in rows):
        gradients = orthogonality_gradient(torch.stack([rows[i].detach() for i in indices]), form=form)
        for index, gradient in zip(indices, gradients.unbind(), strict=True):
            factor = factors[index]
            gradient = gradient if index < len(factors) // 2 else gradient.T
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            factor.grad.add_(gradient.to(factor.dtype), alpha=scale)


@torch.no_grad()
def layer_orthogonality(layers: Sequence[AdaptedLayer], *, form: str) -> dict[str, list[float]]:
    """[R_A, R_B] of every layer, for logs and Fig. 10; 0 for a layer of rank 0."""

    def value(rows: Tensor) -> float:
        return float(orthogonality(rows.detach(), form=form)) if len(rows) else 0.0

    return {layer.name: [value(layer.a.A), value(layer.b.weight.T)] for layer in layers}
