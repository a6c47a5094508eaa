"""The orthogonality term, Eq. (2): its value and, in closed form, its gradient.

Applied as a gradient beside the task's (no autograd, any loss function), at the cost of two r x r products per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pedyra.lora.layer import AdaptedLayer


def orthogonality(rows: Float[Tensor, "*batch r n"], *, form: str) -> Float[Tensor, "*batch"]:
    """||M M^T - I||_F of factors whose r triples are rows, or its square.

    "squared" is Eq. (2) as written; "norm" is the un-squared one of AdaLoRA's code, for which 0.1 and 0.3 were tuned.
    """
    norm = torch.linalg.matrix_norm(_residual(rows))
    return norm.square() if form == "squared" else norm


def orthogonality_gradient(rows: Float[Tensor, "*batch r n"], *, form: str) -> Float[Tensor, "*batch r n"]:
    """d `orthogonality` / d rows: 4 (M M^T - I) M when squared, 2 (M M^T - I) M / ||M M^T - I||_F otherwise.

    Zero where the rows are exactly orthonormal, the minimum, at which the norm has no derivative, and where it is not
    finite: rows that have diverged, beyond 1e9, are no business of this term.
    """
    residual = _residual(rows)
    gradient = residual @ rows.float()
    if form == "squared":
        gradient = 4 * gradient
    else:
        norm = torch.linalg.matrix_norm(residual)[..., None, None]
        gradient = 2 * gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return gradient.nan_to_num_(0.0, 0.0, 0.0)


def _residual(rows: Float[Tensor, "*batch r n"]) -> Float[Tensor, "*batch r r"]:
    rows = rows.float()
    return rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)


@torch.no_grad()
def add_orthogonality_gradient(layers: Sequence[AdaptedLayer], *, weight: float, form: str) -> None:
    """grad += weight * d R_orth / d factor, with R_orth the mean over the 2 L matrices ("norm") or their sum."""
    factors = [layer.a.A for layer in layers if layer.rank] + [layer.b.weight for layer in layers if layer.rank]
    count = len(layers)
    scale = weight / (2 * count) if form == "norm" else weight
    rows = [factor if index < len(factors) // 2 else factor.T for index, factor in enumerate(factors)]
    alike: dict[torch.Size, list[int]] = {}  # in one call: on a GPU it is the number of operations that costs
    for index, row in enumerate(rows):
        alike.setdefault(row.shape, []).append(index)
    for indices in alike.values():
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
