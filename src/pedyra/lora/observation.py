"""What is seen of a layer's inner numbers h = x (E A)^T while a model trains."""

from __future__ import annotations

from collections.abc import Callable

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
