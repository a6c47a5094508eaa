"""One forward of the model in a step: what it was given, and whether its own loss is what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

PARALLEL = 0.02
"""Relative distance of two gradients that are taken for the same, but for their length; half precision is no better."""
COMPARED = 512
"""Rows of them that are compared: all logits of a large vocabulary would take memory several times."""


@dataclass
class Call:
    """One forward of the model."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    samples: Tensor
    share: Tensor | float
    """Of the samples that its own loss is a mean over: 1, but where the model was told to divide by another number."""
    autocast: tuple[bool, torch.dtype]
    has_loss: bool
    loss: Tensor | None = None
    """Its own, with its graph, until it is known whether that is what is trained."""
    is_trained: bool = False
    """Whether a backward pass came to it: to none of an evaluation, nor of a teacher."""
    _weight: Tensor | None = None
    _outputs: Sequence[Tensor] = ()
    _reached: tuple[Tensor, Tensor] | None = None
    """The first output beside the loss that the backward pass came to, and rows of the gradient that it was given."""

    def watch(self, outputs: Sequence[Tensor], loss: Tensor | None, *, trains: bool) -> None:
        """See the gradients of all outputs; an evaluation's graph is not kept."""
        if trains and loss is not None:
            self.loss, self._outputs = loss, outputs
        for index, each in enumerate(outputs):
            if each.requires_grad:
                each.register_hook(self._loss_reached if each is loss else partial(self._output_reached, index))

    def _loss_reached(self, gradient: Tensor) -> None:
        self.end()
        self.is_trained = True
        self._weight = gradient.detach() + (0.0 if self._weight is None else self._weight)

    def _output_reached(self, index: int, gradient: Tensor) -> None:
        self.is_trained = True
        if self._outputs and self._reached is None and gradient.dim() > 0 and gradient.numel() > 0:
            self._reached = self._outputs[index], _rows(gradient)

    def weight(self) -> Tensor | None:
        """The gradient of what is trained with respect to the call's mean loss; None: it does not come from that.

        Some compute the same loss from another output (TRL's from log-probabilities), and its gradient with respect to
        that is then parallel to the own loss's. Waits for the device in this case alone.
        """
        if self._weight is None and self.loss is not None and self._reached is not None:
            loss, (output, given) = self.loss, self._reached
            self.end()
            try:
                (own,) = torch.autograd.grad(loss, output, allow_unused=True)
            except RuntimeError:  # the graph between them is gone
                own = None
            self._weight = None  # the own loss's hook was called
            if own is not None:
                own = _rows(own)
                weight = (own * given).sum() / own.square().sum()
                if (given - weight * own).norm() <= PARALLEL * given.norm():
                    self._weight = weight.to(loss)
        return None if self._weight is None else self._weight * self.share

    def end(self) -> None:
        """Let go of the graph, whose hooks hold this."""
        self.loss, self._outputs, self._reached = None, (), None


def _rows(gradient: Tensor) -> Tensor:
    """`COMPARED` rows at most, evenly spread: (..., n) -> (rows, n)."""
    rows = gradient.detach().reshape(-1, gradient.shape[-1])
    return rows[:: -(-len(rows) // COMPARED)].double()
