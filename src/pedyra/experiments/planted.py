"""The planted-rank benchmark: a student with a uniform LoRA must find the ranks of a teacher's true update.

The teacher is the base plus an update of known rank per layer. What a method reaches is its error relative to the
untouched base, and how far its ranks end from the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROFILES: dict[str, tuple[int, ...]] = {
    "design": (0, 0, 2, 0, 16, 4, 0, 12, 0, 2, 12, 0),
    "sparse": (0, 0, 0, 24, 0, 0, 0, 0, 24, 0, 0, 0),
    "linear": (0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8),
    "uniform": (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
}
"""True ranks of the 12 layers; each sums to 48, the student's budget. "random" draws one per seed."""


@dataclass(frozen=True)
class Problem:
    """A base model to adapt, the function it should become, and the ranks that would do it."""

    base: ResidualMLP
    teacher: ResidualMLP
    true_ranks: tuple[int, ...]
    width: int
    noise: float
    """Standard deviation of the targets' noise, relative to the size of the true change of the output."""


class ResidualMLP(nn.Module):
    """x -> x + tanh(W_l x) / sqrt(depth), layer after layer."""

    layers: Any
    """The nn.Linear of each layer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers) ** 0.5
        return x


def profile_ranks(profile: str, seed: int, depth: int = 12, budget: int = 48) -> tuple[int, ...]:
    """The true ranks of a named profile; "random" spreads the budget over the layers by a draw of its own.

    Raises:
        ValueError: an unknown name.
    """
    if profile == "random":
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(depth, generator=generator) ** 3
        counts = torch.multinomial(shares, budget, replacement=True, generator=generator)
        return tuple(torch.bincount(counts, minlength=depth).tolist())
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is unknown; choose from {', '.join([*PROFILES, 'random'])}")
    return PROFILES[profile]


def make_problem(
    profile: str, seed: int, *, width: int = 64, noise: float = 0.0, strength: float = 1.0, tail: float = 0.03
) -> Problem:
    """A base with N(0, 1 / width) weights and a teacher whose update has the profile's ranks, and a faint tail.

    Each planted direction has a singular value of about `strength`, as large as a base weight's typical one. The
    tail is a full-rank Gaussian update of every layer, `tail` times as large (Frobenius, all layers together) as the
    planted one: no allocation reaches it, so errors end at a floor near tail^2 where they can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = profile_ranks(profile, seed)
    base, teacher = ResidualMLP(width, len(ranks)), ResidualMLP(width, len(ranks))
    planted: list[Tensor] = []
    with torch.no_grad():
        for layer, twin, rank in zip(base.layers, teacher.layers, ranks, strict=True):
            weight = torch.randn(width, width, generator=generator) / width**0.5
            left = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :rank]
            right = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :rank]
            values = strength * (0.5 + torch.rand(rank, generator=generator))
            layer.weight.copy_(weight)
            planted.append((left * values) @ right.T)
            twin.weight.copy_(weight + planted[-1])
        size = sum(float(update.square().sum()) for update in planted) ** 0.5
        for twin in teacher.layers:
            faint = torch.randn(width, width, generator=generator)
            twin.weight.add_(faint * (tail * size / (len(ranks) ** 0.5 * width)))
    return Problem(base.requires_grad_(False), teacher.requires_grad_(False), ranks, width, noise)


def batches(problem: Problem, seed: int, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A source of (input, target) batches: Gaussian inputs, the teacher's outputs, noise on the targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(size, problem.width, generator=generator)
        target = problem.teacher(x)
        if problem.noise:
            spread = problem.noise * (target - problem.base(x)).std()
            target = target + spread * torch.randn(target.shape, generator=generator)
        return x, target

    return draw
