"""The sizes that an adapter may be cut to, and the held-out rows on which each is compared with the whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

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


class Held:
    """Held-out rows on which any model is compared with the whole adapter, batch by batch."""

    def __init__(self, judge: Judge, batches: Sequence[Batch], counted: Counted, *, predicts: bool = False) -> None:
        self._judge, self._batches, self._counted, self._predicts = judge, batches, counted, predicts
        self._weights = [judge.samples(batch) for batch in batches]
        losses, self.metrics, self.correct = self._judged(judge.whole, partial(evaluating, judge.model), batches)
        """Of the whole adapter."""
        self._whole = losses
        self.batches = len(gather_object(losses))
        """Of all processes."""

    @property
    def whole(self) -> list[float]:
        """The loss of the whole adapter on each batch of all processes."""
        return gather_object(self._whole)

    @property
    def weights(self) -> list[float]:
        """How much each of these batches counts: its samples."""
        return gather_object(self._weights)

    def compared(self, cut: Cut, part: float = 1.0) -> Against:
        """The model that `cut` makes beside the whole adapter, on the first rows of the held-out ones.

        Args:
            part: of the rows that are asked; metrics are of all of them.
        """
        batches = self._batches[: max(1, round(part * len(self._batches)))]
        losses, metrics, correct = self._judged(self._judge.losses, cut, batches)
        both = [gather_object(each[: len(losses)]) for each in (self._whole, losses, self._weights)]
        pairs = None
        if part == 1 and correct is not None and self.correct is not None:
            pairs = Pairs.of(self.correct, correct)
        return Against(rise=paired(*both), pairs=pairs, metrics=metrics if part == 1 else {})

    def losses(self, cut: Cut) -> tuple[list[float], Metrics]:
        """Of each batch of all processes with the model that `cut` makes, and its metrics."""
        losses, metrics, _ = self._judged(self._judge.losses, cut, self._batches)
        return gather_object(losses), metrics

    def _judged(
        self, judged: Callable[..., Iterable[float]], cut: Cut, batches: Sequence[Batch]
    ) -> tuple[list[float], Metrics, list[bool] | None]:
        """The losses of this process's batches; metrics, and which rows are right, of all processes."""
        predictions: Predictions | None = [] if self._predicts and len(batches) == len(self._batches) else None
        losses = list(self._counted(judged(batches, cut, predictions)))
        if predictions is None:
            return losses, {}, None
        every = gather_object(predictions)
        metrics = self._judge.metrics(every)
        return losses, metrics, self._judge.correct(every, metrics)


def risen(held: Held, losses: Sequence[float]) -> Increase:
    """By how much these losses of the batches are above those of the whole adapter."""
    return paired(held.whole, losses, held.weights)
