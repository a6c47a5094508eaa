"""The sizes to which an adapter may be cut."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pedyra.export.destinations import Destination
from pedyra.fitting.calibration import Calibration
from pedyra.fitting.heldout import Comparison

Ranks = dict[str, int]
"""Layer -> how many of its balanced directions stay: the first ones."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A size that may be taken, and its measurement against the whole adapter."""

    ranks: Ranks
    parameters: int
    """Of A and B, without heads and magnitudes."""
    share: float
    """Of the parameters of the whole adapter."""
    predicted: float
    """The rise of the loss that the slopes predict for the cut without repair."""
    proof: Comparison | None = None
    """On the held-out rows, or as many of them as it took to tell; None where the size was not measured."""
    accepted: bool | None = None
    """Whether it is proved to be within tolerance; None where it was not measured, or only for the curve."""
    way: str = ""
    """The directions along which it is cut (`fitting.choice`); empty where nothing is cut."""

    @property
    def rank(self) -> int:
        """Return the largest rank of a layer."""
        return max(self.ranks.values())


def whole(calibration: Calibration) -> Ranks:
    """Return the ranks of the adapter as it is."""
    return {name: layer.rank for name, layer in calibration.layers.items()}


def size(calibration: Calibration, ranks: Ranks) -> Candidate:
    """Make this size, with the rise of the loss that is predicted for it."""
    removed = torch.zeros(len(calibration.samples)).double()
    for name, layer in calibration.layers.items():
        removed += layer.slopes[:, ranks[name] :].sum(1)
    everything = whole(calibration)
    parameters, of = (
        sum(layer.parameters * each[name] for name, layer in calibration.layers.items()) for each in (ranks, everything)
    )
    return Candidate(
        ranks=ranks,
        parameters=parameters,
        share=parameters / of,
        predicted=0.0 if ranks == everything else predicted_increase(removed, calibration.samples),
    )


def predicted_increase(slopes: Float[Tensor, " blocks"], samples: Float[Tensor, " blocks"]) -> float:
    """Predict by how much the loss rises without a set of directions, to second order at gates of 1: N/2 Var(c) -
    mean(c); negative where the set does harm, NaN for less than two batches. Directions that work together count
    together.

    c is the sum of the set's slopes in one batch. A batch of N samples shows the variance of a sample's slope divided
    by N, and that variance is the empirical Fisher information: the curvature along the set's common gate.

    Args:
        slopes: c of every batch.
        samples: N of every batch.
    """
    mean = (samples * slopes).sum() / samples.sum()
    variance = (samples * (slopes - mean).square()).sum() / (len(samples) - 1)  # of one sample
    return float(variance / 2 - mean)


def of_rank(calibration: Calibration, rank: int, without: Collection[str] = ()) -> Candidate:
    """Make the size in which every layer has this rank, or all of its own where it has fewer; `without` have none."""
    ranks = {name: 0 if name in without else min(rank, layer.rank) for name, layer in calibration.layers.items()}
    return size(calibration, ranks)


def ranks_below(highest: int) -> list[int]:
    """List the ranks to try of an adapter whose largest is this, from its half down to 1: powers of two and those
    halfway between, which servers like.

    >>> ranks_below(16)
    [8, 6, 4, 3, 2, 1]
    """
    every = {step << power for power in range(highest.bit_length()) for step in (1, 3)}
    return sorted((rank for rank in every if 2 * rank <= highest), reverse=True)


def ranks_at(place: Destination, highest: int) -> list[int]:
    """List the ranks to try of such an adapter for this place, from the one that holds it, or its largest: those
    that the place takes or, where it takes any, `ranks_below`."""
    first = place.rank_for(highest) or place.most or highest
    below = sorted(place.ranks, reverse=True) or ranks_below(first)
    return [first, *(rank for rank in below if place.least <= rank < first)]
