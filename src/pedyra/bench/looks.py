"""What can be learned of a task before the run proper: directions and their gains, from gradients or a short run.

A look sees every layer, says what each of its ranks would be worth, and may place the first triples. What it costs is
taken from the run's steps, but for AutoLoRA's search.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.bench.loop import Draw, make_optimizer, make_plain, make_student, train
from pedyra.lora.attach import AdaptedLayer, attach


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run as it was asked for."""

    base: nn.Module
    layers: Sequence[str]
    draw: Draw
    rank: int
    """Of the budget."""
    lr: float
    scaling: float
    factors: Sequence[float]
    """On the learning rate, step by step."""
    clip: float | None
    seed: int
    fused: bool


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look found."""

    steps: int
    """How many of the run's steps it took."""
    gains: dict[str, list[float]]
    """Layer name -> what each of its ranks is worth, best first; not comparable between kinds of look."""

    def start(self, adapted: Sequence[AdaptedLayer]) -> None:
        """Where the layers begin; here, where they are."""


@dataclass(frozen=True, kw_only=True)
class Directions(Look):
    """A look that found candidate directions for the first triples; per layer, best first."""

    right: dict[str, Tensor]
    """On the input side, orthonormal rows `(n, in)`."""
    left: dict[str, Tensor] | None = None
    """The update along them, `(out, n)`: left @ right is what the look has learned. None: B starts at 0."""

    @torch.no_grad()
    def start(self, adapted: Sequence[AdaptedLayer]) -> None:
        """A's rows become the first directions, as long as the rows were; B what belongs to them."""
        for layer in adapted:
            length = layer.a.A.norm(dim=1).mean()
            layer.a.A.copy_(self.right[layer.name][: layer.rank] * length)
            if self.left is not None:
                layer.b.weight.copy_(self.left[layer.name][:, : layer.rank] / (length * layer.scaling))


Looking = Callable[[Setup], Look]


GRADIENT_STEPS = 20
"""Batches that `gradient_look` spends."""


def gradient_look(setup: Setup, *, steps: int = GRADIENT_STEPS) -> Directions:
    """Top right singular vectors of the dense gradient, averaged over `steps` batches without an update.

    The gain of a direction, u^T G v, comes from the half of the batches that did not choose it.
    """
    first, second = mean_gradients(setup, (steps - steps // 2, steps // 2))
    gains, rights = {}, {}
    for name in setup.layers:
        left, _, right = torch.linalg.svd(first[name], full_matrices=False)
        gains[name] = torch.einsum("or,oi,ri->r", left, second[name], right).sort(descending=True).values.tolist()
        rights[name] = torch.linalg.svd(first[name] + second[name], full_matrices=False).Vh
    return Directions(steps=steps, gains=gains, right=rights)


def mean_gradients(setup: Setup, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """The dense gradient of every layer, averaged over each of these numbers of batches; no weight is changed."""
    model = copy.deepcopy(setup.base).requires_grad_(False)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight.requires_grad_() for name in setup.layers}
    means = []
    for count in counts:
        for _ in range(count):
            setup.draw()(model).backward()
        means.append({name: weight.grad / count for name, weight in weights.items()})
        model.zero_grad()
    return means


def probe_look(setup: Setup, *, part: float = 0.1, widen: int = 4, keep: bool = True, points: int = 0) -> Directions:
    """A LoRA of `widen` times the rank, trained for this part of the run; its update's singular triples.

    While it lasts, the look has more parameters than the budget.

    Args:
        keep: go on from the triples; False: only from their directions, with B = 0.
        points: 0: the gain is the squared singular value, and the pattern by gain per parameter loses least of the
            update (Eckart-Young). Otherwise it is the triple's share in what the update saves of the loss
            (`loss_shares`), which takes as many steps of the look, but at most half of them.
    """
    look_steps = round(part * len(setup.factors))
    points = min(points, look_steps // 2)
    steps = look_steps - points
    weights: dict[str, Any] = {name: setup.base.get_submodule(name).weight for name in setup.layers}
    ranks = {name: min(widen * setup.rank, *weight.shape) for name, weight in weights.items()}
    model = make_student(setup.base, ranks, setup.scaling, setup.seed)
    adapted = attach(model)
    make_plain(adapted, setup.fused)
    train(model, make_optimizer(adapted, setup.lr), setup.draw, setup.factors[:steps], clip=setup.clip)
    make_singular(adapted)
    if points:
        shares = loss_shares(model, adapted, setup.draw, points)
    else:
        shares = [layer.scaling**2 * layer.b.weight.detach().square().sum(0) for layer in adapted]
    gains, rights, lefts = {}, {}, {}
    for layer, share in zip(adapted, shares, strict=True):
        order = share.sort(descending=True)
        gains[layer.name] = order.values.tolist()
        rights[layer.name] = layer.a.A.detach()[order.indices]
        lefts[layer.name] = layer.scaling * layer.b.weight.detach()[:, order.indices]
    return Directions(steps=steps + points, gains=gains, right=rights, left=lefts if keep else None)


@torch.no_grad()
def make_singular(adapted: Sequence[AdaptedLayer]) -> None:
    """Each layer's update as its singular triples: orthonormal rows in A, U S in B; the function stays."""
    for layer in adapted:
        U, S, Vh = torch.linalg.svd(layer.b.weight @ layer.a.weight, full_matrices=False)
        layer.a.A.copy_(Vh[: layer.rank])
        layer.a.E.fill_(1)
        layer.b.weight.copy_(U[:, : layer.rank] * S[: layer.rank])


def loss_shares(model: nn.Module, adapted: Sequence[AdaptedLayer], draw: Draw, points: int) -> list[Tensor]:
    """What each triple saves of the loss, `(rank,)` per layer: integrated gradients from no update to the whole one.

    The shares add up to the whole saving (Sundararajan, Taly, Yan 2017, "completeness"), but for the few points of
    the integral and the batches' noise: one batch for each of `points` places on the path.
    """
    shares = [torch.zeros_like(layer.a.E) for layer in adapted]
    gates: list[Any] = [layer.a.E.requires_grad_() for layer in adapted]
    for point in range(points):
        with torch.no_grad():
            for gate in gates:
                gate.fill_((point + 0.5) / points)
        for share, gradient in zip(shares, torch.autograd.grad(draw()(model), gates), strict=True):
            share -= gradient / points
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1)
    return shares
