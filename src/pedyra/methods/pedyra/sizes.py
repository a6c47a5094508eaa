"""The sets of directions that a cut may remove: prefixes of one order, each with its predicted cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pedyra.fit.curve import removal_order
from pedyra.fit.gramians import Calibration
from pedyra.fit.worth import gate_slopes

LEARNING = 3.0
"""Standard errors by which the slopes of all of a layer's gates together are below zero in a layer that still learns:
more of what it has would save more, so none of it goes."""


@dataclass(frozen=True)
class Size:
    """What stays after a number of removals."""

    ranks: dict[str, int]
    parameters: int
    predicted: float
    """Rise of the mean loss."""


class Sizes:
    """Every prefix of the order in which directions go, from none of them to all that may.

    Args:
        min_rank: what every layer keeps.
        all_may_go: also of layers that still learn.
        tolerance: of the loss; a layer that may save less than its part of it learns nothing that counts.
    """

    def __init__(
        self, calibration: Calibration, min_rank: int = 0, all_may_go: bool = False, tolerance: float = 0.0
    ) -> None:
        self.calibration = calibration
        least = tolerance / max(1, len(calibration.layers))
        learning = (name for name in calibration.layers if still_learns(calibration, name, least))
        self.learning = [] if all_may_go else list(learning)
        """Layers that lose nothing now."""
        left = {name: layer.rank for name, layer in calibration.layers.items()}
        alone = {name: layer.costs for name, layer in calibration.layers.items()}
        self._alone = [0.0]
        parameters = sum(layer.price * layer.rank for layer in calibration.layers.values())
        self._order: list[tuple[str, int]] = []
        """Layer and index of the direction that goes."""
        self._parameters = [parameters]
        for name in removal_order(calibration):
            if name in self.learning or left[name] <= min_rank:
                continue
            left[name] -= 1
            layer = calibration.layers[name]
            parameters -= layer.price
            self._alone.append(self._alone[-1] + float(alone[name][left[name]]))
            self._order.append((name, left[name]))
            self._parameters.append(parameters)
        self.slopes = self._summed({name: layer.slopes for name, layer in calibration.layers.items()})
        """c of every prefix in every step of the window, `(steps, removals + 1)`: the sum of its directions' slopes."""
        self._predicted = _costs(self.slopes, calibration.samples)

    def _summed(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """Layer -> slopes `(steps, r)`, summed over the directions of every prefix."""
        steps = len(self.calibration.samples) if not slopes else len(next(iter(slopes.values())))
        zero = torch.zeros(steps, dtype=torch.float64)
        return torch.stack([zero, *(slopes[name][:, index] for name, index in self._order)], 1).cumsum(1)

    def slopes_of(self, K: Mapping[str, Tensor]) -> Tensor:
        """c of every prefix in one more step, `(removals + 1,)`.

        Args:
            K: layer -> the step's sum of h g^T, `(r, r)`.
        """
        layers = self.calibration.layers
        return self._summed({name: gate_slopes(each[None], layers[name].basis) for name, each in K.items()})[0]

    def __len__(self) -> int:
        """The most removals."""
        return len(self._order)

    def after(self, removals: int) -> Size:
        """The size after so many."""
        ranks = {name: layer.rank for name, layer in self.calibration.layers.items()}
        for name, _ in self._order[:removals]:
            ranks[name] -= 1
        return Size(ranks, self._parameters[removals], self._predicted[removals])

    def within(self, tolerance: float) -> int:
        """The most removals that are predicted to cost no more."""
        return max(count for count, cost in enumerate(self._predicted) if cost <= tolerance or count == 0)

    def costing(self, cost: float, removals: int, measured: float) -> int:
        """The most removals that cost no more than `cost`, where `removals` of them cost `measured`: what directions
        are worth alone says how the cost grows."""
        part = cost / measured * self._alone[removals]
        return max(count for count, alone in enumerate(self._alone) if alone <= part)

    def of_parameters(self, parameters: int) -> int:
        """The fewest removals that leave no more parameters."""
        fewest = (count for count, left in enumerate(self._parameters) if left <= parameters)
        return next(fewest, len(self))


def _costs(c: Tensor, samples: Tensor) -> list[float]:
    """`worth.predicted_cost` of every prefix, whose slopes are `c`: N/2 Var(c) - mean(c)."""
    if len(samples) < 2:
        return [0.0, *[float("nan")] * (c.shape[1] - 1)]
    mean = (samples[:, None] * c).sum(0) / samples.sum()
    variance = (samples[:, None] * (c - mean).square()).sum(0) / (len(samples) - 1)
    return (variance / 2 - mean).tolist()


def still_learns(calibration: Calibration, name: str, least: float = 0.0) -> bool:
    """Whether the loss falls along all gates of the layer together, by more than `least` for twice of them, and clear
    of the noise of the window's steps."""
    c, weights = calibration.layers[name].slopes.sum(1), calibration.samples / calibration.samples.sum()
    if len(c) < 2:
        return True
    mean = float((weights * c).sum())
    error = float(((weights * (c - mean)).square().sum() * len(c) / (len(c) - 1)).sqrt())
    return mean < -max(LEARNING * error, least)


def kept(ranks: Mapping[str, int], calibration: Calibration) -> dict[str, Tensor]:
    """Layer -> the projection `(r, r)` onto its first `ranks[name]` balanced directions, where it loses any."""
    found = {}
    for name, layer in calibration.layers.items():
        k = ranks[name]
        if k < layer.rank:
            found[name] = layer.basis.inverse[:, :k] @ layer.basis.T[:k]
    return found
