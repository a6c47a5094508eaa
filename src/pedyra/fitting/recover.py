"""Recovery: a few steps in which the cut adapter learns to say what the whole one says. Labels have no part in it.

A label is one noisy draw, and an adapter that is already trained overfits it. The whole adapter's output is the mean
that was learned from all of them (Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network").

No layer can recover alone: the B' that is nearest to B A x given the kept directions of A x is B P T'^T (T' P T'^T)^-1,
and in the balanced basis, where T P T^T is diagonal, that is what the cut leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from pedyra.fitting.calibration import evaluating, frozen
from pedyra.fitting.cut import evened, replaced
from pedyra.fitting.judge import Batch, Judge, gap
from pedyra.fitting.verdict import Factors

RATE = 0.01
"""Of the first step, as a part of a factor's root mean square; it falls to 0 linearly. On the demo 0.003 does half as
much, and 0.02 the same."""


def distill(
    judge: Judge,
    factors: Factors,
    batches: Sequence[Batch],
    steps: int,
    *,
    adapter: str = "default",
    rate: float = RATE,
) -> Factors:
    """These factors after so many steps of Adam towards what the model says with its own; the model stays as it is.

    A step takes one of the batches, from the first again after the last. Without dropout and weight decay, at a rate
    that is a part of each factor's size and falls to 0. A step whose gradient is not finite is left out. The processes
    of accelerate take other batches at the same time, and a step then has the mean of their gradients.

    Args:
        factors: of every layer.
    """
    model = judge.model
    trained = {
        name: tuple(nn.Parameter(each.contiguous()) for each in evened(A.float(), B.float()))
        for name, (A, B) in factors.items()
    }
    parameters = [each for pair in trained.values() for each in pair if each.numel()]
    groups = [{"params": [each], "lr": rate * float(each.detach().square().mean().sqrt())} for each in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with evaluating(model, checkpointing=True), frozen(model):
        for batch in islice(cycle(batches), steps):
            with torch.no_grad():
                teacher = judge.outputs(batch)
            optimizer.zero_grad()
            with torch.enable_grad(), replaced(model, trained, adapter):
                distance = gap(judge.outputs(batch), teacher, numbers=_are_numbers(batch, teacher))
                (distance * judge.loss_scale).backward()  # to which Adam is indifferent, and half precision is not
            given = reduce([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], "mean")
            finite = all(bool(each.isfinite().all()) for each in given)
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient if finite else None  # Adam leaves out what has none
            optimizer.step()
            schedule.step()
    return {name: (A.detach(), B.detach()) for name, (A, B) in trained.items()}


def _are_numbers(batch: Batch, outputs: Sequence[Tensor]) -> bool:
    """Whether a model's outputs are numbers by themselves, and no logits of classes."""
    labels = batch.get("labels")
    return (isinstance(labels, Tensor) and labels.is_floating_point()) or any(each.shape[-1] == 1 for each in outputs)
