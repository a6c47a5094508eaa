"""The curve of loss against parameters of one adapter: the ranks of each size, and what it is predicted to cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import sub

import torch
from torch import Tensor

from pedyra.fitting.gramians import Calibration
from pedyra.fitting.worth import gate_slopes, predicted_costs

SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 3 / 64, 1 / 32, 1 / 64, 0.0)
"""Parts of the parameters at which the curve is measured: about a factor of 1.4 apart, down to one direction in all."""

Ranks = dict[str, int]
"""Layer -> how many of its balanced directions stay: the first ones."""


@dataclass(frozen=True)
class Shape:
    """What a smaller adapter has to look like for whoever serves it."""

    max_rank: int | None = None
    """No layer keeps more."""
    same_rank: bool = False
    """Every layer keeps the same rank."""
    multiple_of: int = 1
    """Ranks are multiples of it (or as many directions as the layer has)."""
    drop: Callable[[str], bool] | None = None
    """Layers that keep none."""
    least: int = 0
    """Every other layer keeps at least so many: 1 where a layer has more than its directions (DoRA's magnitude)."""

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank is {self.max_rank}; a rank is at least 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}; it must be at least 1")
        if self.max_rank is not None and self.max_rank < self.multiple_of:
            raise ValueError(
                f"max_rank is {self.max_rank}, below multiple_of {self.multiple_of}: no rank is left; raise max_rank"
            )

    def most(self, name: str, rank: int) -> int:
        """The largest rank of a layer that has `rank` directions."""
        if self.drop is not None and self.drop(name):
            return 0
        most = rank if self.max_rank is None else min(rank, self.max_rank)
        return most if most == rank else most - most % self.multiple_of

    def rounded(self, kept: int, most: int) -> int:
        """At least as many, in multiples."""
        return min(most, math.ceil(max(kept, self.least) / self.multiple_of) * self.multiple_of)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size on the curve. Costs are of the mean loss, against the adapter as it is."""

    ranks: Ranks
    parameters: int
    share: float
    """Of the parameters of the whole adapter."""
    predicted: float
    measured: float | None = None
    """Cut, and nothing more."""
    standard_error: float | None = None
    recovered: float | None = None
    """Cut, and after steps of recovery."""
    recovered_standard_error: float | None = None

    def with_measured(self, cost: float, standard_error: float) -> Point:
        return replace(self, measured=cost, standard_error=standard_error)

    def with_recovered(self, cost: float, standard_error: float) -> Point:
        return replace(self, recovered=cost, recovered_standard_error=standard_error)

    @property
    def gains_by_recovery(self) -> bool:
        """Whether the steps lowered the upper bound of the cost; where they did not, the cut stays as it was.

        What recovers costs less, and it also says nearly what the whole adapter says, so that its cost is better known.
        """
        after = _bound(self.recovered, self.recovered_standard_error)
        return after < _bound(self.measured, self.standard_error)

    @property
    def best(self) -> tuple[float, float] | None:
        """The cost of this size as it would be taken, and its standard error; None before it was measured."""
        cost, error = self.measured, self.standard_error
        if self.gains_by_recovery:
            cost, error = self.recovered, self.recovered_standard_error
        return None if cost is None or error is None else (cost, error)


def _bound(cost: float | None, error: float | None) -> float:
    """The upper bound, 97.5 %."""
    return math.inf if cost is None or error is None else cost + 1.96 * error


def whole(calibration: Calibration) -> Ranks:
    """The ranks of the adapter as it is."""
    return {name: layer.rank for name, layer in calibration.layers.items()}


def num_parameters(calibration: Calibration, ranks: Mapping[str, int]) -> int:
    """Of A and B together, without heads and magnitudes."""
    return sum(layer.price * ranks[name] for name, layer in calibration.layers.items())


def point(calibration: Calibration, ranks: Ranks) -> Point:
    """This size, and what it is predicted to cost."""
    removed = torch.zeros(len(calibration.samples)).double()
    for name, layer in calibration.layers.items():
        removed += layer.slopes[:, ranks[name] :].sum(1)
    parameters = num_parameters(calibration, ranks)
    everything = num_parameters(calibration, whole(calibration))
    cost = float(predicted_costs(removed[:, None], calibration.samples))
    predicted = 0.0 if ranks == whole(calibration) else cost
    return Point(ranks=ranks, parameters=parameters, share=parameters / everything, predicted=predicted)


def removal_order(calibration: Calibration) -> list[tuple[str, int]]:
    """The layer that loses its last direction, and how many it then has, again and again: what costs least per
    parameter first."""
    entries = []
    for position, (name, layer) in enumerate(calibration.layers.items()):
        costs = (layer.costs / layer.price).tolist()
        entries += [(cost, position, -index, name) for index, cost in enumerate(costs)]
    return [(name, -index) for _, _, index, name in sorted(entries)]


class Prefixes:
    """Every prefix of the order in which directions go, from none of them to all that may.

    Args:
        least: what every layer keeps.
        whole_layers: those that lose nothing.
    """

    def __init__(self, calibration: Calibration, least: int = 0, whole_layers: Collection[str] = ()) -> None:
        self.calibration = calibration
        order = removal_order(calibration)
        self._order = [(name, left) for name, left in order if left >= least and name not in whole_layers]
        prices = [calibration.layers[name].price for name, _ in self._order]
        self.parameters = [*accumulate(prices, sub, initial=num_parameters(calibration, whole(calibration)))]
        """That each prefix leaves."""
        costs = {name: layer.costs.tolist() for name, layer in calibration.layers.items()}
        self._alone = [*accumulate((costs[name][index] for name, index in self._order), initial=0.0)]
        """What the directions of each prefix cost one by one."""
        self.slopes = self._summed({name: layer.slopes for name, layer in calibration.layers.items()})
        """c of every prefix in every step of the window, `(steps, removals + 1)`: the sum of its directions' slopes."""
        self.predicted: list[float] = predicted_costs(self.slopes, calibration.samples).tolist()
        """Rise of the mean loss without each prefix."""

    def _summed(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """Layer -> slopes `(steps, r)`, summed over the directions of every prefix."""
        none = torch.zeros(len(next(iter(slopes.values()))), dtype=torch.float64)
        return torch.stack([none, *(slopes[name][:, index] for name, index in self._order)], 1).cumsum(1)

    def slopes_of(self, K: Mapping[str, Tensor]) -> Tensor:
        """c of every prefix in one more step, `(removals + 1,)`.

        Args:
            K: layer -> the step's sum of h g^T, `(r, r)`.
        """
        layers = self.calibration.layers
        return self._summed({name: gate_slopes(each[None], layers[name].basis) for name, each in K.items()})[0]

    def ranks(self, removals: int) -> Ranks:
        """What every layer keeps after so many."""
        return whole(self.calibration) | dict(self._order[:removals])

    def within(self, tolerance: float) -> int:
        """The most removals that are predicted to cost no more."""
        return max(count for count, cost in enumerate(self.predicted) if cost <= tolerance or count == 0)

    def costing(self, cost: float, removals: int, measured: float) -> int:
        """The most removals that cost no more than `cost`, where `removals` of them cost `measured`: what directions
        are worth alone says how the cost grows."""
        part = cost / measured * self._alone[removals]
        return max(count for count, alone in enumerate(self._alone) if alone <= part)

    def of_parameters(self, parameters: int) -> int:
        """The fewest removals that leave no more parameters; all of them, where none leaves so few."""
        return next((count for count, left in enumerate(self.parameters) if left <= parameters), len(self._order))


def sizes(calibration: Calibration, shape: Shape, shares: Sequence[float] = SHARES) -> list[Point]:
    """The sizes to look at, the largest first: the whole adapter in this shape, then the parts `shares` of it."""
    most = {name: shape.most(name, layer.rank) for name, layer in calibration.layers.items()}
    everything = num_parameters(calibration, whole(calibration))
    if shape.same_rank:
        every = list(_uniform(most, shape))
    else:
        every = []
        bounds = iter((1.0, *shares))
        bound = next(bounds, None)
        smallest: Ranks = {}
        for ranks in _shaped(calibration, most, shape):
            parameters = num_parameters(calibration, ranks)
            while bound is not None and parameters <= bound * everything:
                if not every or every[-1] != ranks:
                    every.append(ranks)
                bound = next(bounds, None)
            if bound is None:
                break
            smallest = ranks
        if bound is not None and every[-1] != smallest:  # below the last bound there is nothing: the least there is
            every.append(smallest)
    return [point(calibration, ranks) for ranks in every]


def within(calibration: Calibration, shape: Shape, parameters: int) -> Point:
    """The largest size in this shape of at most so many parameters.

    Raises:
        ValueError: not even the smallest has so few; with what it has.
    """
    most = {name: shape.most(name, layer.rank) for name, layer in calibration.layers.items()}
    ways = _uniform(most, shape) if shape.same_rank else _shaped(calibration, most, shape)
    found = 0
    for ranks in ways:
        found = num_parameters(calibration, ranks)
        if found <= parameters:
            return point(calibration, ranks)
    raise ValueError(f"parameters is {parameters}, but the smallest such adapter has {found}; raise it")


def _shaped(calibration: Calibration, most: Mapping[str, int], shape: Shape) -> Iterator[Ranks]:
    """Ranks after each removal, from `most` down to one direction in all; steps that change nothing are left out."""
    ranks = {name: shape.rounded(rank, most[name]) for name, rank in whole(calibration).items()}
    yield dict(ranks)
    for name, left in removal_order(calibration):
        rank = shape.rounded(left, most[name])
        if rank != ranks[name]:
            ranks[name] = rank
            if not any(ranks.values()):
                return
            yield dict(ranks)


def _uniform(most: Mapping[str, int], shape: Shape) -> Iterator[Ranks]:
    """The same rank in every layer that keeps one, from the largest down to 1."""
    highest = max(most.values())
    for rank in range(highest, 0, -1):
        if rank == highest or rank % shape.multiple_of == 0:
            yield {name: min(rank, limit) for name, limit in most.items()}


def by_type(types: Collection[str], names: Collection[str]) -> Callable[[str], bool]:
    """Whether a layer's name ends with one of these module types, as PEFT's target_modules match.

    Raises:
        ValueError: a type that no layer has.
    """
    for kind in types:
        if not any(_ends(name, kind) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"drop_types names {kind!r}, which no layer of the adapter has; it has {', '.join(known)}")
    return lambda name: any(_ends(name, kind) for kind in types)


def _ends(name: str, kind: str) -> bool:
    return name == kind or name.endswith(f".{kind}")
