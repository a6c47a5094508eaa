"""The gradient of a bilevel problem: how the upper parameters act on a loss through one step of the lower ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def hypergradient(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    lower: Sequence[nn.Parameter],
    upper: Sequence[nn.Parameter],
    *,
    lower_step: Callable[[], None],
    learning_rate: float,
) -> list[Tensor]:
    """dL_val(w'(a), a) / da with w' one lower step from w, by the finite difference of DARTS (Liu et al. 2019).

    dL_val/da (w') - eta (dL_tr/da (w + eps v) - dL_tr/da (w - eps v)) / (2 eps), with v = dL_val/dw (w') and
    eps = 0.01 / |v|: w' is taken as w - eta dL_tr/dw, whatever the optimizer that makes the step.

    Args:
        train_loss, val_loss: the losses at the current values of `lower` (w) and `upper` (a), on one batch each.
        lower_step: takes the step from w to w'; afterwards `lower` has its values of before again.
        learning_rate: eta.
    """
    before = [parameter.detach().clone() for parameter in lower]
    lower_step()
    gradients = gradients_of(val_loss(), [*lower, *upper])
    v, direct = gradients[: len(lower)], gradients[len(lower) :]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part.float()) for part in v])).item()
    ends = []
    # At no slope at all the second term is 0 / 0, and its limit is zero.
    for eps in (0.01 / norm, -0.01 / norm) if norm > 0 else ():
        with torch.no_grad():
            for parameter, value, part in zip(lower, before, v, strict=True):
                parameter.copy_(value + eps * part)
        # The same dropout at both ends: divided by 2 eps, the difference of two draws would drown the derivative.
        with torch.random.fork_rng(devices=_devices(lower)):
            ends.append(gradients_of(train_loss(), upper))
    with torch.no_grad():
        for parameter, value in zip(lower, before, strict=True):
            parameter.copy_(value)
    if not ends:
        return direct
    scale = learning_rate * norm / 0.02
    return [here - scale * (plus - minus) for here, plus, minus in zip(direct, *ends, strict=True)]


def gradients_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """dloss/dp of each parameter; zeros for one that the loss does not know."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _devices(parameters: Sequence[nn.Parameter]) -> list[int]:
    return sorted({parameter.get_device() for parameter in parameters if parameter.is_cuda})
