"""Recovery: a few steps in which the cut adapter learns to say what the whole one says. Labels have no part in it.

A label is one noisy draw, and an adapter that is already trained overfits it. The whole adapter's output is the mean
that was learned from all of them (Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network").

No layer can recover alone: the B' that is nearest to B A x given the kept directions of A x is B P T'^T (T' P T'^T)^-1,
and in the balanced basis, where T P T^T is diagonal, that is what the cut leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pedyra.fitting.calibration import Batch, evaluating, lora_layers
from pedyra.fitting.curve import Point, Ranks
from pedyra.fitting.cut import Factors, cut
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.samples import shifts
from pedyra.fitting.verdict import Tolerance, smallest_within

RATE = 0.01
"""Of the first step, as a part of a factor's root mean square; it falls to 0 linearly. On the demo 0.003 does half as
much, and 0.02 the same."""

Outputs = Callable[[nn.Module, Batch], list[Tensor]]
"""What a model says of a batch: tensors `(..., classes)` of logits."""


def model_outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The logits that a transformers model gives for a batch; of a language model where a label is asked for."""
    found = model(**batch)
    logits = [value for key, value in found.items() if key.endswith("logits")]
    labels = batch.get("labels")
    if len(logits) == 1 and isinstance(labels, Tensor) and labels.dim() == 2 and logits[0].dim() == 3:
        asked = labels[:, int(shifts(model)) :] != -100
        return [logits[0][:, : asked.shape[1]][asked]]
    return logits


def divergence(student: Float[Tensor, "*n classes"], teacher: Float[Tensor, "*n classes"]) -> Float[Tensor, ""]:
    """Mean of KL(teacher || student) over all but the last dimension, of the softmax of both."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def gap(student: Sequence[Tensor], teacher: Sequence[Tensor], numbers: bool) -> Tensor:
    """How far the student's outputs are from the teacher's: squared error where they are `numbers`, else divergence."""
    if numbers:
        return sum(((s - t).float().square().mean() for s, t in zip(student, teacher, strict=True)), torch.zeros(()))
    return sum((divergence(s, t) for s, t in zip(student, teacher, strict=True)), torch.zeros(()))


def evened(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"]) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """The same B A, with equal root mean squares of each row of A and its column of B, so that one rate suits both."""
    scale = (B.square().mean(0) / A.square().mean(1)).pow(0.25)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return A * scale[:, None], B / scale


def check_steps(recover: int) -> None:
    """Raise ValueError where it is no number of steps."""
    if recover < 0:
        raise ValueError(f"recover is {recover}; it is a number of steps, 0 or more")


def recovered_curve(curve: Sequence[Point], limit: Tolerance, recovery: Callable[[Point], Point]) -> list[Point]:
    """The curve with `recovery` of the smallest size that the cut alone leaves within tolerance, and of those below it,
    down to the first that recovery does not bring there. Where nothing was learned, nothing is tried."""
    start, found = smallest_within(curve, limit), list(curve)
    for index, size in enumerate(curve):
        if not limit.learned or start is not None and size.parameters > start.parameters:
            continue
        found[index] = recovery(size)
        if smallest_within(found, limit) != found[index]:
            break
    return found


def cut_factors(model: nn.Module, calibration: Calibration, ranks: Ranks, adapter: str = "default") -> Factors:
    """Factors of every layer, with its first `ranks[name]` balanced directions."""
    found = {}
    for name, module in lora_layers(model, adapter).items():
        A, B = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        pair = cut(A.cpu(), B.cpu(), calibration.layers[name].basis, ranks[name])
        found[name] = tuple(each.to(A.device, torch.float32) for each in pair)
    return found


def distill(
    model: nn.Module,
    factors: Factors,
    batches: Sequence[Batch],
    steps: int,
    *,
    adapter: str = "default",
    outputs: Outputs = model_outputs,
    rate: float = RATE,
) -> Factors:
    """These factors after so many steps of Adam towards what `model` says with its own; the model stays as it is.

    A step takes one of the batches, from the first again after the last. Without dropout and weight decay, at a rate
    that is a part of each factor's size and falls to 0. A step whose gradient is not finite is left out.

    Args:
        factors: of every layer, float32.
    """
    trained = {name: tuple(nn.Parameter(each.contiguous()) for each in evened(*pair)) for name, pair in factors.items()}
    parameters = [each for pair in trained.values() for each in pair if each.numel()]
    groups = [{"params": [each], "lr": rate * float(each.detach().square().mean().sqrt())} for each in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with evaluating(model):
        for batch in islice(cycle(batches), steps):
            with torch.no_grad():
                teacher = outputs(model, batch)
            labels = batch.get("labels")
            numbers = isinstance(labels, Tensor) and labels.is_floating_point()
            with torch.enable_grad(), replaced(model, trained, adapter):
                distance = gap(outputs(model, batch), teacher, numbers)
                # Not backward(): the model's own parameters are to get no gradient.
                gradients = torch.autograd.grad(distance, parameters, allow_unused=True)
            finite = all(each is None or bool(each.isfinite().all()) for each in gradients)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if finite else None  # Adam leaves out what has none
            optimizer.step()
            schedule.step()
    return {name: (A.detach(), B.detach()) for name, (A, B) in trained.items()}


@contextmanager
def replaced(model: nn.Module, factors: Mapping[str, Sequence[Tensor]], adapter: str = "default") -> Iterator[None]:
    """While it lasts, each layer adds what these factors give; those of the adapter stay as they are."""
    layers = lora_layers(model, adapter)
    own = {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            A, B = factors[name]
            layer.lora_A[adapter] = _Linear(A)
            layer.lora_B[adapter] = _Linear(B, own[name][1].bias)
        yield
    finally:
        for name, layer in layers.items():
            layer.lora_A[adapter], layer.lora_B[adapter] = own[name]


class _Linear(nn.Module):
    """nn.Linear of a weight that exists, which may be of rank 0."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight) if not isinstance(weight, nn.Parameter) else weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
