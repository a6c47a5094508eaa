"""The sizes that an adapter may be cut to: the ranks of each, and by how much the loss is predicted to rise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pedyra.errors import UserError
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.verdict import Candidate, Ranks
from pedyra.fitting.wanted import Shape
from pedyra.fitting.worth import predicted_increases


def whole(calibration: Calibration) -> Ranks:
    """The ranks of the adapter as it is."""
    return {name: layer.rank for name, layer in calibration.layers.items()}


def num_parameters(calibration: Calibration, ranks: Mapping[str, int]) -> int:
    """Of A and B together, without heads and magnitudes."""
    return sum(layer.parameters * ranks[name] for name, layer in calibration.layers.items())


def point(calibration: Calibration, ranks: Ranks) -> Candidate:
    """This size, and by how much the loss is predicted to rise."""
    removed = torch.zeros(len(calibration.samples)).double()
    for name, layer in calibration.layers.items():
        removed += layer.slopes[:, ranks[name] :].sum(1)
    parameters = num_parameters(calibration, ranks)
    everything = num_parameters(calibration, whole(calibration))
    increase = float(predicted_increases(removed[:, None], calibration.samples))
    predicted = 0.0 if ranks == whole(calibration) else increase
    return Candidate(ranks=ranks, parameters=parameters, share=parameters / everything, predicted=predicted)


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
        self.shape = shape
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

    def point(self, index: int) -> Candidate:
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
            raise UserError(
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
