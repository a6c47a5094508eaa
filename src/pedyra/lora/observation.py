"""What is seen of a model while it trains: a module's calls, and a layer's inner numbers h = x (E A)^T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

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


class Watch:
    """A forward hook that does nothing in a copy of its module, or a pickle: they are not the model that is trained."""

    def __init__(self, see: Callable[..., object] | None = None) -> None:
        self._see = see

    def __call__(self, *call: Any) -> None:
        if self._see is not None:
            self._see(*call)

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


def weakly(method: Callable[..., None]) -> Callable[..., object]:
    """What calls the method while its object lives, and does not keep it alive."""
    reference = WeakMethod(method)
    return lambda *call: (found := reference()) and found(*call)
