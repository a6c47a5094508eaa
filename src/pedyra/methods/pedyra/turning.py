"""Turning a layer's triples to other directions of the same product, in place, with the optimizer's state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import turn_state
from pedyra.fitting.worth import Balance
from pedyra.lora.layer import AdaptedLayer


def scaled(basis: Balance, layer: AdaptedLayer) -> Tensor:
    """W `(r, r)` that turns a layer to its balanced directions, each row of A as long as rows are now on average.

    Adam's steps are as large for every element whatever its size, so lengths decide how fast a direction turns.
    """
    A = layer.a.A.detach().double().cpu()
    lengths = (basis.T @ A).norm(dim=1)
    mean = A.norm(dim=1).mean()
    factors = torch.where(lengths > 1e-12 * mean, mean / lengths, torch.ones_like(lengths))
    return (factors[:, None] * basis.T).to(layer.a.A.device)


@torch.no_grad()
def turn_layer(layer: AdaptedLayer, optimizer: Optimizer, W: Tensor) -> None:
    """A becomes W A and B becomes B W^-1, for W `(r, r)` and in its precision; their moments turn too. E must be 1."""
    inverse = torch.linalg.inv_ex(W).inverse
    A, B = layer.a.A, layer.b.weight
    A.copy_(W @ A.to(W.dtype))
    B.copy_(B.to(W.dtype) @ inverse)
    turn_state(optimizer, A, inverse.T, dim=0)  # a gradient of A turns against A,
    turn_state(optimizer, B, W, dim=1)  # and one of B with it
