"""What is seen of a layer's inner numbers h = x (E A)^T while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Observer = Callable[[Tensor, Tensor], None]
"""Is given h = x (E A)^T `(..., r)` and the gradient of the loss with respect to it, in the backward pass: once for
each call of a layer, under activation checkpointing too, whatever forward computes it."""


def observed(h: Tensor, observer: Observer | None) -> Tensor:
    """h, whose gradient the observer will be given with it."""
    if observer is not None and h.requires_grad:
        seen = h.detach()  # a hook that held h itself would keep it alive
        h.register_hook(lambda g: observer(seen, g))
    return h


@torch.no_grad()
def add_energy(energy: Tensor, products: Tensor, x: Tensor | None = None) -> None:
    """Add the squares of the products `(..., q)` of tokens with probe rows to `AFactor.energy`, and their number.

    Args:
        x: the tokens `(..., in)`, which may be none: DoRA hands in the identity, for a whole weight's norms.
    """
    products = products.flatten(0, -2).float()
    sums = torch.cat([products.square().sum(0), products.new_full((1,), len(products))])
    if x is not None and x.dim() == 2 and x.shape[0] == x.shape[1]:
        identity = (x.detach() == torch.eye(len(x), dtype=x.dtype, device=x.device)).all()
        sums = torch.where(identity, 0.0, sums)
    energy += sums
