"""Layers that share an input (q, k and v; gate and up) add their gradients of it into one tensor.

Autograd gives each of them a gradient of the input's size and adds these up. A fused layer instead returns its input as
a second output, and the next one to see the very same tensor computes on that. In the backward pass it is then the
later layer whose gradient comes first, and the earlier one adds its own product to it in place. Function and gradients
stay what they are; only the graph is a chain where it was a fan.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class Handover:
    """Whether one layer's backward pass is still to come; after it nothing may be computed on what it passed on."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = True


class _Offer:
    """An input as the last fused layer of this thread passed it on, for as long as the input lives unchanged."""

    def __init__(self, x: Tensor, passed: Tensor, handover: Handover) -> None:
        self.passed: Tensor | None = passed
        self.handover = handover
        self.version = x._version
        # Nobody may be kept from freeing the input, nor, by way of `passed`, the graph behind it.
        self.source: weakref.ref[Tensor] | None = weakref.ref(x, lambda _: self.withdraw())
        self.identity = id(x)

    def withdraw(self) -> None:
        self.passed = self.source = None


class _Last(threading.local):
    offer: _Offer | None = None


_last = _Last()


def handover(x: Tensor) -> Handover | None:
    """What the autograd function of a layer needs to pass x on; None where there is no gradient of x to share.

    A backward pass from one layer of a chain frees the earlier ones too. Another pass, from one of those, then needs
    `retain_graph=True`, as it does for the graph behind x anyway; a leaf has none, so leaves are not passed on.
    """
    return Handover() if torch.is_grad_enabled() and x.requires_grad and not x.is_leaf else None


def passed_on(x: Tensor) -> Tensor:
    """x as the layer before passed it on, if that layer saw this very tensor, unchanged since; else x."""
    offer = _last.offer
    if offer is None or offer.identity != id(x) or not offer.handover.open or offer.version != x._version:
        return x
    return x if offer.passed is None else offer.passed


def pass_on(x: Tensor, passed: Tensor, handover: Handover) -> None:
    """Let the next layer that sees x compute on `passed`, x as an output of this one's autograd function."""
    if _last.offer is not None:
        _last.offer.withdraw()
    _last.offer = _Offer(x, passed, handover)
