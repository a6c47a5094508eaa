"""Any model is compared with the whole adapter on held-out rows, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from pedyra.fitting.judge import Batch, Cut, Judge, Predictions
from pedyra.fitting.modes import evaluating
from pedyra.fitting.paired import Increase, Pairs, paired

Metrics = dict[str, float]
"""Name of a metric of the task -> its value."""
REPEATED = 1e-3
"""The same model may give a loss that differs by this part, as half precision rounds on a GPU."""
Counted = Callable[[Iterable[Any]], Iterable[Any]]
"""It passes items on, and tells each as a batch that is done."""


@dataclass(frozen=True)
class Against:
    """A smaller adapter was compared with the whole one, on the same held-out rows."""

    rise: Increase
    pairs: Pairs | None = None
    """Rows are counted that one has right and the other wrong; None where the task has no accuracy of rows."""
    metrics: Metrics = field(default_factory=dict)
    """The task's metrics are those of the smaller adapter; empty where it has none."""


@dataclass
class Answers:
    """One model has answered the first batches of this process so far."""

    losses: list[float] = field(default_factory=list)
    predictions: Predictions = field(default_factory=list)


class Held:
    """The whole adapter has answered these held-out batches of this process."""

    def __init__(self, judge: Judge, batches: Sequence[Batch], counted: Counted) -> None:
        self._judge, self._batches, self._counted = judge, batches, counted
        self._weights = [judge.samples(batch) for batch in batches]
        answers = Answers()
        self._ask(judge.whole, partial(evaluating, judge.model), answers, len(batches))
        self._answers, self._whole = answers, answers.losses
        self.metrics, self.correct = self._told(answers)
        self.batches = len(gather_object(answers.losses))
        """All processes together have this number."""

    @property
    def whole(self) -> list[float]:
        """Return the loss of the whole adapter on each batch of all processes."""
        return gather_object(self._whole)

    @property
    def weights(self) -> list[float]:
        """Return the samples of each batch, by which it counts."""
        return gather_object(self._weights)

    def compared(self, cut: Cut, part: float = 1.0, answers: Answers | None = None) -> Against:
        """Compare the model that `cut` makes with the whole adapter, on the first rows of the held-out ones.

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
        """Return the loss of each batch of all processes with the model that `cut` makes, and its metrics."""
        answers = Answers()
        self._ask(self._judge.losses, cut, answers, len(self._batches))
        return gather_object(answers.losses), self._told(answers)[0]

    def repeats(self, cut: Cut | None = None, answers: Answers | None = None) -> bool:
        """Tell whether the model that `cut` makes, by default the whole adapter, says of the first batch what it said
        before, in every process: a layer that keeps weights of another size does not.

        Args:
            answers: what the model said before.
        """
        judged = self._judge.whole if cut is None else self._judge.losses
        again, before = Answers(), (answers or self._answers).losses
        self._ask(judged, cut or partial(evaluating, self._judge.model), again, 1)
        noise = REPEATED * sum(map(abs, before)) / max(1, len(before))
        return all(gather_object([all(abs(x - y) <= noise for x, y in zip(again.losses, before, strict=False))]))

    def risen(self, losses: Sequence[float]) -> Increase:
        """Return by how much these losses of the batches are above those of the whole adapter."""
        return paired(self.whole, losses, self.weights)

    def _ask(self, judged: Callable[..., Iterable[float]], cut: Cut, answers: Answers, count: int) -> None:
        """Have the model answer the first `count` batches of this process, those aside that it has answered."""
        batches = self._batches[len(answers.losses) : count]
        if batches:
            answers.losses += self._counted(judged(batches, cut, answers.predictions))

    def _told(self, answers: Answers) -> tuple[Metrics, list[bool] | None]:
        """Return the metrics of all rows, and which of them are right."""
        predictions = gather_object(answers.predictions)
        metrics = self._judge.metrics(predictions)
        return metrics, self._judge.correct(predictions, metrics)
