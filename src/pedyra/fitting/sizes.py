"""The sizes of one adapter, and all that is measured of them: on the rows of the choice, and on those of the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from pedyra.fitting.calibration import disabled, evaluating
from pedyra.fitting.cut import cut_factors, cut_to
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.judge import Batch, Cut, Judge, Predictions
from pedyra.fitting.recover import distill
from pedyra.fitting.verdict import Candidate, Factors, Increase, Metrics, paired

Counted = Callable[[Iterable[Any]], Iterable[Any]]
"""What passes items on, and tells each as a batch that is done."""


class Held:
    """Held-out rows on which any size is compared with the whole adapter, batch by batch.

    Args:
        predicts: metrics of the task are wanted too.
    """

    def __init__(self, judge: Judge, batches: Sequence[Batch], counted: Counted, *, predicts: bool = False) -> None:
        self._judge, self._batches, self._counted, self._predicts = judge, batches, counted, predicts
        self.weights = gather_object([judge.samples(batch) for batch in batches])
        self.metrics: Metrics = {}
        """Of the last pass."""
        self.whole = self._all(judge.whole, partial(evaluating, judge.model))

    def _all(self, judged: Callable[..., Iterator[float]], cut: Cut) -> list[float]:
        predictions: Predictions | None = [] if self._predicts else None
        losses = list(self._counted(judged(self._batches, cut, predictions)))
        if predictions is not None:
            self.metrics = self._judge.metrics(gather_object(predictions))
        return gather_object(losses)

    def losses(self, cut: Cut) -> list[float]:
        """Of each batch, of all processes, with the model that `cut` makes."""
        return self._all(self._judge.losses, cut)

    def increase(self, cut: Cut) -> Increase:
        """Mean rise of the loss with the model that `cut` makes, and its standard error."""
        return paired(self.whole, self.losses(cut), self.weights)


class Sizes:
    """What a search asks of each size.

    Args:
        measured: what the directions are worth, and how they make up for each other.
        batches: those that recovery trains on, those of the choice, and those of the proof.
        steps: of recovery; 0: there is none.
        bar: a progress bar, which is told what is done and how much of it.
    """

    def __init__(
        self,
        judge: Judge,
        measured: Calibration,
        batches: tuple[Sequence[Batch], Sequence[Batch], Sequence[Batch]],
        *,
        adapter: str,
        steps: int,
        bar: Any,
    ) -> None:
        self.judge, self.measured, self.adapter, self.steps, self.bar = judge, measured, adapter, steps, bar
        self._calibration, choice, proof = batches
        bar.set_description("whole adapter")
        self.choice = Held(judge, choice, self.counted)
        self.proof = Held(judge, proof, self.counted, predicts=True)
        self.metrics = {"whole": self.proof.metrics}
        """Of the whole adapter and of the base model, on the rows of the proof."""
        bar.set_description("base model")
        base = partial(disabled, judge.model)
        losses = self.choice.losses(base) + self.proof.losses(base)
        self.metrics["base"] = self.proof.metrics
        self.won = paired(self.choice.whole + self.proof.whole, losses, self.choice.weights + self.proof.weights)
        """The loss of the base model less that of the whole adapter."""

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each told as a batch that is done."""
        for item in items:
            yield item
            self.bar.update()

    @property
    def recovers(self) -> bool:
        """Whether there are steps of recovery."""
        return self.steps > 0

    @property
    def ahead(self) -> tuple[float, int]:
        """Of the proof, its standard error as a part of that of the choice, by their samples; and its batches."""
        return (sum(self.choice.weights) / sum(self.proof.weights)) ** 0.5, len(self.proof.weights)

    def factors(self, size: Candidate) -> Factors:
        """A and B of each layer, as this size would be taken."""
        if size.gains_by_recovery and size.factors is not None:
            return size.factors
        return cut_factors(self.judge.model, self.measured, size.ranks, self.adapter)

    def on_choice(self, size: Candidate) -> Increase:
        """On the rows of the choice, as it is cut."""
        self.bar.set_description(f"choice, {size.share:.1%}")
        return self.choice.increase(self._cut(self.factors(size)))

    def after_recovery(self, size: Candidate) -> tuple[Increase, Factors]:
        """The same after steps of recovery, and what they made of the factors."""
        self.bar.set_description(f"recovery, {size.share:.1%}")
        factors = cut_factors(self.judge.model, self.measured, size.ranks, self.adapter)
        factors = distill(self.judge, factors, self._calibration, self.steps, adapter=self.adapter)
        return self.choice.increase(self._cut(factors)), factors

    def on_proof(self, size: Candidate) -> tuple[Increase, Metrics]:
        """On the rows of the proof, as this size would be taken."""
        self.bar.set_description(f"proof, {size.share:.1%}")
        return self.proof.increase(self._cut(self.factors(size))), self.proof.metrics

    def _cut(self, factors: Factors) -> Cut:
        return partial(cut_to, self.judge.model, factors, self.adapter)
