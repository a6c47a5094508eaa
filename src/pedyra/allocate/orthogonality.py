"""The orthogonality term, Eq. (2): its value and, in closed form, its gradient.

Applied as a gradient beside the task's (no autograd, any loss function), at the cost of two r x r products per layer.
Under Adam, which normalises the sum of both, the larger one alone is followed, and the ratio of their norms says which.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pedyra.lora.layer import AdaptedLayer


def orthogonality(rows: Float[Tensor, "*batch r n"], *, form: str) -> Float[Tensor, "*batch"]:
    """||M M^T - I||_F of factors whose triples are rows ("norm", as AdaLoRA's), or its square ("squared", Eq. 2)."""
    norm = torch.linalg.matrix_norm(_residual(rows))
    return norm.square() if form == "squared" else norm


def orthogonality_gradient(
    rows: Float[Tensor, "*batch r n"], *, form: str, ranks: Sequence[int] | None = None
) -> Float[Tensor, "*batch r n"]:
    """d `orthogonality` / d rows: 4 (M M^T - I) M when squared, 2 (M M^T - I) M / ||M M^T - I||_F otherwise.

    Zero where the rows are exactly orthonormal, at which the norm has no derivative, and where it is not finite: rows
    beyond 1e9. `ranks`: matrix i of a batch has so many rows, and zeros after them; default: all are rows.
    """
    residual = _residual(rows, ranks)
    gradient = residual @ rows.float()
    if form == "squared":
        gradient = 4 * gradient
    else:
        norm = torch.linalg.matrix_norm(residual)[..., None, None]
        gradient = 2 * gradient / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return gradient.nan_to_num_(0.0, 0.0, 0.0)


def _residual(rows: Float[Tensor, "*batch r n"], ranks: Sequence[int] | None = None) -> Float[Tensor, "*batch r r"]:
    rows = rows.float()
    count = rows.shape[-2]
    identity = torch.eye(count, device=rows.device) if ranks is None else _identities(tuple(ranks), count, rows.device)
    return rows @ rows.mT - identity


@functools.lru_cache(maxsize=64)
def _identities(ranks: tuple[int, ...], count: int, device: torch.device) -> Float[Tensor, "batch count count"]:
    """Return an identity of each rank, in zeros; they are the same from one adjustment to the next."""
    diagonals = torch.arange(count) < torch.tensor(ranks)[:, None]
    return diagonals.float().diag_embed().to(device)


@torch.no_grad()
def add_orthogonality_gradient(
    layers: Sequence[AdaptedLayer], *, weight: float, form: str, measure: bool = False
) -> Float[Tensor, ""] | None:
    """grad += weight * d R_orth / d factor, with R_orth the mean over the 2 L matrices ("norm") or their sum.

    With `measure` it returns the norm of what was added over that of the gradients that were there, of all A and B.
    Matrices of one width go together: the time of a step is that of the number of operations.
    """
    scale = weight / (2 * len(layers)) if form == "norm" else weight
    sizes: list[tuple[Tensor, Tensor]] = []  # norms of what was there, and of what is added, by width
    alike: dict[tuple[int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}  # gradients and triples, both as rows
    for layer in (layer for layer in layers if layer.rank):
        A, _, B = layer.factors
        for factor, is_a in ((A, True), (B, False)):
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            rows, gradient = factor.detach(), factor.grad
            pair = (gradient, rows) if is_a else (gradient.T, rows.T)
            alike.setdefault((pair[1].shape[1], rows.dtype), []).append(pair)
    for (_, dtype), pairs in alike.items():
        gradients, rows = zip(*pairs, strict=True)
        ranks = [len(each) for each in rows]
        penalty = orthogonality_gradient(pad_sequence(list(rows), batch_first=True), form=form, ranks=ranks)
        if measure:
            task = torch.stack(torch._foreach_norm(gradients)).norm()
            sizes.append((task.float(), penalty.norm() * scale))
        parts = [part[:rank] for part, rank in zip(penalty.to(dtype).unbind(), ranks, strict=True)]
        torch._foreach_add_(gradients, parts, alpha=scale)
    if not sizes:
        return None
    task, penalty = (torch.stack(norms).norm() for norms in zip(*sizes, strict=True))
    return penalty / task


@torch.no_grad()
def layer_orthogonality(layers: Sequence[AdaptedLayer], *, form: str) -> dict[str, list[float]]:
    """[R_A, R_B] of every layer, for logs and Fig. 10; 0 for a layer of rank 0."""

    def value(rows: Tensor) -> float:
        return float(orthogonality(rows.detach(), form=form)) if len(rows) else 0.0

    return {layer.name: [value(layer.a.A), value(layer.b.weight.T)] for layer in layers}
