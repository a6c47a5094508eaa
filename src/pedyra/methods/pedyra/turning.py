"""Turning a layer's triples to other directions of the same product, in place, with the optimizer's state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.optimizer_state import LARGEST, SECOND_MOMENTS, forget_overflow
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import turn


@torch.no_grad()
def turn_layer(layer: AdaptedLayer, optimizer: Optimizer, W: Tensor) -> None:
    """Turn the layer's triples by W `(r, r)`, and their moments.

    A gradient of B turns with A, one of A against B, and so do their moving averages. Second moments turn as if the
    gradients of a layer's triples were uncorrelated, and largest sizes (Adamax) become the largest that they can be.
    """
    inverse = torch.linalg.inv_ex(W).inverse
    turn(layer, W, inverse)
    A, B = layer.a.A, layer.b.weight
    for parameter, rows, mix in ((A, True, inverse.T), (B, False, W.T)):
        forget_overflow(optimizer, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            by = mix.square() if key in SECOND_MOMENTS else mix.abs() if key in LARGEST else mix
            largest = torch.finfo(value.dtype).max
            turned = by @ value.to(W.dtype) if rows else value.to(W.dtype) @ by
            value.copy_(turned.nan_to_num_(0.0, largest, -largest))  # the largest numbers, mixed, may overflow
