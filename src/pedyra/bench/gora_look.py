"""GoRA as a contender of the small benchmarks: its look at the gradient, its ranks and its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.bench.looks import Look, Setup, mean_gradients
from pedyra.lora.attach import AdaptedLayer
from pedyra.methods.gora import GoraSettings, ranks_of, start_of_b


@dataclass(frozen=True, kw_only=True)
class GoraLook(Look):
    """Of the gradient G; `gains` has one number a layer, its importance."""

    rows: dict[str, Tensor]
    """A `(max_rank, in)`: the first of them are where a layer starts."""
    gradients_of_rows: dict[str, Tensor]
    """G A^T `(out, max_rank)`."""
    rank: int
    """Of the budget."""
    eta: float

    @torch.no_grad()
    def start(self, adapted: Sequence[AdaptedLayer]) -> None:
        """A's rows as drawn, B one step down the gradient, and scaling alpha / sqrt(rank) with the budget's alpha."""
        for layer in adapted:
            layer.rescale(self.rank / layer.rank**0.5)
            A, gradient_of_A = self.rows[layer.name][: layer.rank], self.gradients_of_rows[layer.name][:, : layer.rank]
            layer.a.A.copy_(A)
            layer.b.weight.copy_(start_of_b(gradient_of_A, A, eta=self.eta, scaling=layer.scaling))


def gora_look(setup: Setup) -> GoraLook:
    """GoRA's: mean |W * G| of every layer, G the dense gradient averaged over as many batches as the method takes."""
    settings = GoraSettings()
    (gradients,) = mean_gradients(setup, [settings.steps])
    generator = torch.Generator().manual_seed(setup.seed)
    gains, rows, gradients_of_rows = {}, {}, {}
    for name, gradient in gradients.items():
        weight: Any = setup.base.get_submodule(name).weight
        A = torch.empty(_most_ranks(setup.rank), weight.shape[1])
        rows[name] = nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)  # LoRA's own start
        gains[name], gradients_of_rows[name] = [float((weight * gradient).abs().mean())], gradient @ A.T
    return GoraLook(
        steps=settings.steps, gains=gains, rows=rows, gradients_of_rows=gradients_of_rows, rank=setup.rank,
        eta=settings.eta,
    )  # fmt: skip


def by_importance(costs: Mapping[str, int], rank: int, gains: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """GoRA's ranks, from half to four times the uniform `rank`, at its budget of parameters.

    The method rounds down and clamps, which leaves it beside the budget. Here what is above goes where most is above a
    layer's share, and what is left over where most is missing.
    """
    importance = {name: gains[name][0] for name in costs}
    ranks = ranks_of(importance, costs, r=rank, min_rank=max(1, rank // 2), max_rank=_most_ranks(rank))
    left = sum(costs[name] * (rank - ranks[name]) for name in costs)
    total, budget = sum(importance.values()) or 1.0, rank * sum(costs.values())
    missing = {name: budget * importance[name] / total / costs[name] - ranks[name] for name in costs}

    def change(name: str, by: int) -> None:
        nonlocal left
        ranks[name] += by
        missing[name] -= by
        left -= by * costs[name]

    while left < 0:
        change(min((name for name in costs if ranks[name] > max(1, rank // 2)), key=lambda name: missing[name]), -1)
    while fitting := [name for name in costs if costs[name] <= left and ranks[name] < _most_ranks(rank)]:
        change(max(fitting, key=lambda name: missing[name]), 1)
    return ranks


def _most_ranks(rank: int) -> int:
    return 4 * rank
