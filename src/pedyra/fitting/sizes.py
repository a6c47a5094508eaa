"""The sizes that an adapter may be cut to, and the held-out rows on which each is compared with the whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from pedyra.export.destinations import Destination
from pedyra.fitting.calibration import evaluating
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.judge import Batch, Cut, Judge, Predictions
from pedyra.fitting.paired import Increase, Pairs, paired
from pedyra.fitting.verdict import Against, Candidate, Metrics, Ranks
from pedyra.fitting.worth import predicted_increases

Counted = Callable[[Iterable[Any]], Iterable[Any]]
"""What passes items on, and tells each as a batch that is done."""


def whole(calibration: Calibration) -> Ranks:
    """The ranks of the adapter as it is."""
    return {name: layer.rank for name, layer in calibration.layers.items()}


def num_parameters(calibration: Calibration, ranks: Mapping[str, int]) -> int:
    """Of A and B together, without heads and magnitudes."""
    return sum(layer.parameters * ranks[name] for name, layer in calibration.layers.items())


def size(calibration: Calibration, ranks: Ranks) -> Candidate:
    """This size, and by how much the loss is predicted to rise."""
    removed = torch.zeros(len(calibration.samples)).double()
    for name, layer in calibration.layers.items():
        removed += layer.slopes[:, ranks[name] :].sum(1)
    everything = whole(calibration)
    parameters = num_parameters(calibration, ranks)
    increase = float(predicted_increases(removed[:, None], calibration.samples))
    return Candidate(
        ranks=ranks,
        parameters=parameters,
        share=parameters / num_parameters(calibration, everything),
        predicted=0.0 if ranks == everything else increase,
    )


def of_rank(calibration: Calibration, rank: int) -> Candidate:
    """The size in which every layer has this rank, or all of its own where it has fewer."""
    return size(calibration, {name: min(rank, layer.rank) for name, layer in calibration.layers.items()})


def ranks_below(highest: int) -> list[int]:
    """The ranks to ask of an adapter whose largest is this, from its half down to 1: powers of two and those halfway
    between, which servers like.

    >>> ranks_below(16)
    [8, 6, 4, 3, 2, 1]
    """
    every = {step << power for power in range(highest.bit_length()) for step in (1, 3)}
    return sorted((rank for rank in every if 2 * rank <= highest), reverse=True)


def ranks_at(place: Destination, highest: int) -> list[int]:
    """The ranks to ask of such an adapter for this place: from the one that holds it, or the place's largest, those
    that it takes or, where it takes any, those that a fit asks."""
    first = place.rank_for(highest) or place.most or highest
    below = sorted(place.ranks, reverse=True) or ranks_below(first)
    return [first, *(rank for rank in below if place.least <= rank < first)]


@dataclass
class Answers:
    """What one model has answered so far, on the first batches of this process."""

    losses: list[float] = field(default_factory=list)
    predictions: Predictions = field(default_factory=list)


class Held:
    """Held-out rows on which any model is compared with the whole adapter, batch by batch."""

    def __init__(self, judge: Judge, batches: Sequence[Batch], counted: Counted, *, predicts: bool = False) -> None:
        self._judge, self._batches, self._counted, self._predicts = judge, batches, counted, predicts
        self._weights = [judge.samples(batch) for batch in batches]
        answers = Answers()
        self._ask(judge.whole, partial(evaluating, judge.model), answers, len(batches))
        self._whole = answers.losses
        self.metrics, self.correct = self._told(answers)
        """Of the whole adapter."""
        self.batches = len(gather_object(answers.losses))
        """Of all processes."""

    @property
    def whole(self) -> list[float]:
        """The loss of the whole adapter on each batch of all processes."""
        return gather_object(self._whole)

    @property
    def weights(self) -> list[float]:
        """How much each of these batches counts: its samples."""
        return gather_object(self._weights)

    def compared(self, cut: Cut, part: float = 1.0, answers: Answers | None = None) -> Against:
        """The model that `cut` makes beside the whole adapter, on the first rows of the held-out ones.

        Args:
            part: of the rows that are asked; metrics are of all of them.
            answers: those of an earlier call for the same model, which are gone on from.
        """
        answers = Answers() if answers is None else answers
        self._ask(self._judge.losses, cut, answers, max(1, round(part * len(self._batches))))
        count = len(answers.losses)
        rise = paired(*(gather_object(each[:count]) for each in (self._whole, answers.losses, self._weights)))
        if count < len(self._batches):
            return Against(rise=rise)
        metrics, correct = self._told(answers)
        pairs = None if correct is None or self.correct is None else Pairs.of(self.correct, correct)
        return Against(rise=rise, pairs=pairs, metrics=metrics)

    def losses(self, cut: Cut) -> tuple[list[float], Metrics]:
        """Of each batch of all processes with the model that `cut` makes, and its metrics."""
        answers = Answers()
        self._ask(self._judge.losses, cut, answers, len(self._batches))
        return gather_object(answers.losses), self._told(answers)[0]

    def _ask(self, judged: Callable[..., Iterable[float]], cut: Cut, answers: Answers, count: int) -> None:
        """Have the model answer the first `count` batches of this process, those aside that it has answered."""
        batches = self._batches[len(answers.losses) : count]
        predictions = answers.predictions if self._predicts else None
        if batches:
            answers.losses += self._counted(judged(batches, cut, predictions))

    def _told(self, answers: Answers) -> tuple[Metrics, list[bool] | None]:
        """The metrics of all rows, and which of them are right."""
        if not self._predicts:
            return {}, None
        predictions = gather_object(answers.predictions)
        metrics = self._judge.metrics(predictions)
        return metrics, self._judge.correct(predictions, metrics)


def risen(held: Held, losses: Sequence[float]) -> Increase:
    """By how much these losses of the batches are above those of the whole adapter."""
    return paired(held.whole, losses, held.weights)
