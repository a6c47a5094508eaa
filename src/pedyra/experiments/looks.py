"""What can be learned of a task before the run proper: directions and their gains, from gradients or a short run.

A look spends some of the run's steps. It sees every layer, gives candidate directions for each, and may hand over a
start for B.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.adapters.attach import AdaptedLayer, attach
from pedyra.experiments.loop import Loss, make_optimizer, make_plain, make_student, train


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run as it was asked for."""

    base: nn.Module
    layers: Sequence[str]
    loss: Loss
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
    """What a look found; per layer, best first."""

    steps: int
    """How many of the run's steps it took."""
    gains: dict[str, list[float]]
    """What each candidate direction is worth; not comparable with those of another kind of look."""
    right: dict[str, Tensor]
    """Directions on the input side, orthonormal rows `(n, in)`."""
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


def gradient_look(setup: Setup, *, steps: int = 20) -> Look:
    """Top right singular vectors of the dense gradient, averaged over `steps` batches without an update.

    The gain of a direction, u^T G v, comes from the half of the batches that did not choose it.
    """
    model = copy.deepcopy(setup.base).requires_grad_(False)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight.requires_grad_() for name in setup.layers}
    halves = []
    for count in (steps - steps // 2, steps // 2):
        for _ in range(count):
            setup.loss(model).backward()
        halves.append([weight.grad / count for weight in weights.values()])
        model.zero_grad()
    gains, rights = {}, {}
    for name, first, second in zip(setup.layers, *halves, strict=True):
        left, _, right = torch.linalg.svd(first, full_matrices=False)
        gains[name] = torch.einsum("or,oi,ri->r", left, second, right).sort(descending=True).values.tolist()
        rights[name] = torch.linalg.svd(first + second, full_matrices=False).Vh
    return Look(steps=steps, gains=gains, right=rights)


def probe_look(setup: Setup, *, part: float = 0.1, widen: int = 4, keep: bool = True) -> Look:
    """A LoRA of `widen` times the rank, trained for this part of the run; its update's singular triples.

    The gain is the squared singular value: the best patterns by gain per parameter then lose least of the update
    (Eckart-Young). While it lasts, the look has more parameters than the budget.

    Args:
        keep: go on from the triples; False: only from their directions, with B = 0.
    """
    steps = round(part * len(setup.factors))
    model = make_student(setup.base, dict.fromkeys(setup.layers, widen * setup.rank), setup.scaling, setup.seed)
    adapted = attach(model)
    make_plain(adapted, setup.fused)
    train(model, make_optimizer(adapted, setup.lr), setup.loss, setup.factors[:steps], clip=setup.clip)
    gains, rights, lefts = {}, {}, {}
    for layer in adapted:
        update = layer.scaling * layer.b.weight.detach() @ layer.a.A.detach()
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        count = layer.rank
        gains[layer.name] = S[:count].square().tolist()
        rights[layer.name], lefts[layer.name] = Vh[:count], U[:, :count] * S[:count]
    return Look(steps=steps, gains=gains, right=rights, left=lefts if keep else None)
