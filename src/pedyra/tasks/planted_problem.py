"""The planted-rank benchmark: a student with a uniform LoRA must find the ranks of a teacher's true update.

The teacher is the base plus an update of known rank per layer. What a method reaches is its error relative to the
untouched base, and how far its ranks end from the truth. All layers are width x width, so that a rank costs the same
everywhere and the true ranks are exactly the student's budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROFILES: dict[str, tuple[int, ...]] = {
    "design": (0, 0, 2, 0, 16, 4, 0, 12, 0, 2, 12, 0),
    "sparse": (0, 0, 0, 24, 0, 0, 0, 0, 24, 0, 0, 0),
    "linear": (0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8),
    "uniform": (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4),
}
"""True ranks of 12 layers with a budget of 4 each. "random" draws others per seed."""

ARCHITECTURES = ("mlp", "block")
PROBLEM_SEED = 0
"""Of the problems that recipes name, one per profile: a run's seed changes the adapter and the order of the rows."""

TOKENS = 8
"""Length of a sequence of the block architecture."""


@dataclass(frozen=True)
class Problem:
    """A base model to adapt, the function it should become, and the ranks that would do it."""

    base: PlantedModel
    teacher: PlantedModel
    true_ranks: tuple[int, ...]
    noise: float
    """Standard deviation of the targets' noise, relative to the size of the true change of the output."""

    @property
    def layer_names(self) -> list[str]:
        """In the order of `true_ranks`."""
        return [f"layers.{index}" for index in range(len(self.true_ranks))]


class PlantedModel(nn.Module):
    """A stack of `depth` width x width linear layers without biases, `layers`; subclasses say what they compute."""

    inputs: tuple[int, ...]
    """Shape of an input beside the batch."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))


class ResidualMLP(PlantedModel):
    """x -> x + tanh(W_l x) / sqrt(depth), layer after layer; x `(batch, width)`."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.inputs = (width,)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers) ** 0.5
        return x


class Blocks(PlantedModel):
    """Pre-norm transformer blocks, six layers each (q, k, v, o, up, down); x `(batch, TOKENS, width)`, four heads.

    Attention is not causal, and the feed-forward part is as wide as the model.
    """

    def __init__(self, width: int, depth: int) -> None:
        if depth % 6 or width % 4:
            raise ValueError(f"a block has 6 layers and 4 heads; {depth} layers of width {width} are no whole blocks")
        super().__init__(width, depth)
        self.inputs = (TOKENS, width)

    def forward(self, x: Tensor) -> Tensor:
        scale = (len(self.layers) / 3) ** -0.5  # of two branches a block
        for first in range(0, len(self.layers), 6):
            q, k, v, o, up, down = self.layers[first : first + 6]
            h = F.layer_norm(x, x.shape[-1:])
            heads = (layer(h).unflatten(-1, (4, -1)).transpose(-3, -2) for layer in (q, k, v))
            attended = F.scaled_dot_product_attention(*heads)
            x = x + o(attended.transpose(-3, -2).flatten(-2)) * scale
            x = x + down(F.gelu(up(F.layer_norm(x, x.shape[-1:])))) * scale
        return x


def profile_ranks(profile: str, seed: int, depth: int = 12, budget: int = 48, width: int = 64) -> tuple[int, ...]:
    """The true ranks of a named profile, scaled to `depth` layers and a sum of `budget`, none above `width`.

    "random" draws the layers' shares, and then the ranks from them.

    Raises:
        ValueError: an unknown name, or a profile that does not fit into the width.
    """
    if profile == "random":
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(depth, generator=generator) ** 3
        counts = torch.multinomial(shares, budget, replacement=True, generator=generator)
        ranks = tuple(torch.bincount(counts, minlength=depth).tolist())
    elif profile in PROFILES:
        ranks = _scaled(PROFILES[profile], depth, budget)
    else:
        raise ValueError(f"profile {profile!r} is unknown; choose from {', '.join([*PROFILES, 'random'])}")
    if max(ranks) > width:
        raise ValueError(f"profile {profile!r} has a layer of rank {max(ranks)} in a width of {width}; widen the model")
    return ranks


def _scaled(profile: tuple[int, ...], depth: int, budget: int) -> tuple[int, ...]:
    """The profile's shape over another number of layers; largest remainders make the sum exact."""
    shares = [profile[index * len(profile) // depth] for index in range(depth)]
    total = sum(shares)
    if total == 0:
        raise ValueError(f"{depth} layers are too few for this profile; take 12 or more")
    ranks = [share * budget // total for share in shares]
    by_remainder = sorted(range(depth), key=lambda index: (-(shares[index] * budget % total), index))
    for index in by_remainder[: budget - sum(ranks)]:
        ranks[index] += 1
    return tuple(ranks)


def make_problem(
    profile: str,
    seed: int,
    *,
    architecture: str = "mlp",
    width: int = 64,
    depth: int = 12,
    rank: int = 4,
    noise: float = 0.0,
    strength: float = 1.0,
    tail: float = 0.03,
) -> Problem:
    """A base with N(0, 1 / width) weights and a teacher whose update has the profile's ranks, and a faint tail.

    Each planted direction has a singular value of about `strength`, as large as a base weight's typical one. The
    tail is a full-rank Gaussian update of every layer, `tail` times as large (Frobenius, all layers together) as the
    planted one: no allocation reaches it, so errors end at a floor near tail^2 where they can be compared.

    Args:
        depth: number of linear layers; six make a transformer block.
        rank: the student's uniform rank; times `depth` it is the budget that the profile spends.

    Raises:
        ValueError: an unknown profile or architecture, or sizes that do not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = profile_ranks(profile, seed, depth, rank * depth, width)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; it is a finite number of at least 0")
    kind = ResidualMLP if architecture == "mlp" else Blocks
    base, teacher = kind(width, depth), kind(width, depth)
    size = 0.0
    with torch.no_grad():
        for layer, twin, count in zip(base.layers, teacher.layers, ranks, strict=True):
            weight = torch.randn(width, width, generator=generator) / width**0.5
            left = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :count]
            right = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[:, :count]
            values = strength * (0.5 + torch.rand(count, generator=generator))
            layer.weight.copy_(weight)  # type: ignore[operator]
            twin.weight.copy_(weight + (left * values) @ right.T)  # type: ignore[operator]
            size += float(values.square().sum())
        for twin in teacher.layers:
            faint = torch.randn(width, width, generator=generator)
            twin.weight.add_(faint * (tail * (size / depth) ** 0.5 / width))  # type: ignore[operator]
    return Problem(base.requires_grad_(False), teacher.requires_grad_(False), ranks, noise)


def batches(problem: Problem, seed: int, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A source of (input, target) batches: `size` Gaussian vectors, the teacher's outputs, noise on the targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = _shape(problem, size)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(shape, generator=generator)
        target = problem.teacher(x)
        if problem.noise:
            spread = problem.noise * (target - problem.base(x)).std()
            target = target + spread * torch.randn(target.shape, generator=generator)
        return x, target

    return draw


@torch.no_grad()
def relative_error(problem: Problem, model: nn.Module) -> float:
    """Mean squared distance to the teacher over that of the base, on 2048 held-out vectors without noise."""
    x = torch.randn(_shape(problem, 2048), generator=torch.Generator().manual_seed(999))
    target = problem.teacher(x)
    return float((model(x) - target).square().mean() / (problem.base(x) - target).square().mean())


def _shape(problem: Problem, vectors: int) -> tuple[int, ...]:
    per_row = 1
    for length in problem.base.inputs[:-1]:
        per_row *= length
    return (vectors // per_row, *problem.base.inputs)


@lru_cache(maxsize=1)
def problem_of(profile: str) -> Problem:
    """Twelve layers of width 64, true ranks of sum 48. Raises ValueError for an unknown profile."""
    return make_problem(profile, PROBLEM_SEED)
