"""The sizes that an adapter may be cut to: the ranks of each, and by how much the loss is predicted to rise."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from pedyra.fitting.gramians import Calibration
from pedyra.fitting.verdict import Point, Ranks
from pedyra.fitting.worth import predicted_increases


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

    @property
    def is_free(self) -> bool:
        """Whether only what directions are worth says which of them stay."""
        return self.max_rank is None and not self.same_rank and self.multiple_of == 1 and self.drop is None

    def most(self, name: str, rank: int) -> int:
        """The largest rank of a layer that has `rank` directions."""
        if self.drop is not None and self.drop(name):
            return 0
        most = rank if self.max_rank is None else min(rank, self.max_rank)
        return most if most == rank else most - most % self.multiple_of

    def rounded(self, kept: int, most: int) -> int:
        """At least as many, in multiples."""
        return min(most, math.ceil(max(kept, self.least) / self.multiple_of) * self.multiple_of)


def whole(calibration: Calibration) -> Ranks:
    """The ranks of the adapter as it is."""
    return {name: layer.rank for name, layer in calibration.layers.items()}


def num_parameters(calibration: Calibration, ranks: Mapping[str, int]) -> int:
    """Of A and B together, without heads and magnitudes."""
    return sum(layer.parameters * ranks[name] for name, layer in calibration.layers.items())


def point(calibration: Calibration, ranks: Ranks) -> Point:
    """This size, and by how much the loss is predicted to rise."""
    removed = torch.zeros(len(calibration.samples)).double()
    for name, layer in calibration.layers.items():
        removed += layer.slopes[:, ranks[name] :].sum(1)
    parameters = num_parameters(calibration, ranks)
    everything = num_parameters(calibration, whole(calibration))
    increase = float(predicted_increases(removed[:, None], calibration.samples))
    predicted = 0.0 if ranks == whole(calibration) else increase
    return Point(ranks=ranks, parameters=parameters, share=parameters / everything, predicted=predicted)


def removal_order(calibration: Calibration) -> list[tuple[str, int]]:
    """The layer that loses its last direction, and how many it then has, again and again: what the loss rises least by,
    for each parameter, first."""
    entries = []
    for position, (name, layer) in enumerate(calibration.layers.items()):
        increases = (layer.increases / layer.parameters).tolist()
        entries += [(increase, position, -index, name) for index, increase in enumerate(increases)]
    return [(name, -index) for _, _, index, name in sorted(entries)]


class Ladder:
    """Every size of this shape, the largest first, down to one direction in all; no two have the same ranks."""

    def __init__(self, calibration: Calibration, shape: Shape) -> None:
        self.calibration = calibration
        most = {name: shape.most(name, layer.rank) for name, layer in calibration.layers.items()}
        ways = _uniform(most, shape) if shape.same_rank else _shaped(calibration, most, shape)
        self._changes = list(ways)
        self.everything = num_parameters(calibration, whole(calibration))
        ranks: Ranks = {}
        self.parameters: list[int] = []
        """Of each size."""
        for change in self._changes:
            before = sum(calibration.layers[name].parameters * ranks.get(name, 0) for name in change)
            ranks |= change
            after = sum(calibration.layers[name].parameters * rank for name, rank in change.items())
            self.parameters.append(after - before + (self.parameters[-1] if self.parameters else 0))

    def __len__(self) -> int:
        return len(self._changes)

    def point(self, index: int) -> Point:
        """The size at this place."""
        ranks: Ranks = {}
        for change in self._changes[: index + 1]:
            ranks |= change
        return point(self.calibration, {name: ranks[name] for name in self.calibration.layers})

    def within(self, parameters: float) -> int:
        """The place of the largest size of at most so many parameters. Raises ValueError: not even the smallest has so
        few; with what it has."""
        found = next((index for index, count in enumerate(self.parameters) if count <= parameters), None)
        if found is None:
            raise ValueError(
                f"parameters is {parameters:,.0f}, but the smallest such adapter has {self.parameters[-1]:,}; raise it"
            )
        return found

    def at(self, share: float) -> int:
        """The place of the largest size of at most this part of the parameters; the smallest, where none has so few."""
        slack = 1 + 1e-9  # the share of a size is that size again, whatever a float makes of it
        return self.within(max(share * self.everything * slack, self.parameters[-1]))

    def is_whole(self, index: int) -> bool:
        """Whether the size at this place is the whole adapter."""
        return self.parameters[index] == self.everything

    def share(self, index: int) -> float:
        """Part of the parameters of the whole adapter."""
        return self.parameters[index] / self.everything


def _shaped(calibration: Calibration, most: Mapping[str, int], shape: Shape) -> Iterator[Ranks]:
    """The ranks of the largest size, then what changes with each removal that changes anything."""
    ranks = {name: shape.rounded(rank, most[name]) for name, rank in whole(calibration).items()}
    yield dict(ranks)
    left_in_all = sum(ranks.values())
    for name, left in removal_order(calibration):
        rank = shape.rounded(left, most[name])
        if rank != ranks[name]:
            left_in_all += rank - ranks[name]
            ranks[name] = rank
            if not left_in_all:
                return
            yield {name: rank}


def _uniform(most: Mapping[str, int], shape: Shape) -> Iterator[Ranks]:
    """The same rank in every layer that keeps one, from the largest down to 1."""
    highest = max(most.values())
    for rank in range(highest, 0, -1):
        if rank == highest or rank % shape.multiple_of == 0:
            yield {name: min(rank, limit) for name, limit in most.items()}


def by_type(types: Collection[str], names: Collection[str]) -> Callable[[str], bool]:
    """Whether a layer's name ends with one of these module types, as PEFT's target_modules match. Raises ValueError: a
    type that no layer has, or nothing is left."""
    for kind in types:
        if not any(_ends(name, kind) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"drop_types names {kind!r}, which no layer of the adapter has; it has {', '.join(known)}")
    if all(any(_ends(name, kind) for kind in types) for name in names):
        raise ValueError(f"drop_types names every layer of the adapter ({', '.join(types)}); leave one out")
    return lambda name: any(_ends(name, kind) for kind in types)


def _ends(name: str, kind: str) -> bool:
    return name == kind or name.endswith(f".{kind}")
