"""Any model is compared with the whole adapter on held-out rows, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pedyra.errors import UserError
from pedyra.fitting.judge import Answer, Batch, Cut, Judge, Predictions
from pedyra.fitting.logits import NUMBERS, Logits, RowAnswers, by_row, per_token, row_answers, share_of
from pedyra.fitting.modes import evaluating
from pedyra.fitting.paired import Increase, Pairs, paired
from pedyra.fitting.share import Share

Metrics = dict[str, float]
"""Name of a metric of the task -> its value."""
REPEATED = 1e-3
"""The same model may give a loss that differs by this part, as half precision rounds on a GPU."""
Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""It yields the same items, and counts each as a batch that is done."""


@dataclass(frozen=True)
class Comparison:
    """A smaller adapter beside the whole one, on the same held-out rows; None stands for what was not measured."""

    rise: Increase | None = None
    """The rise of the loss."""
    pairs: Pairs | None = None
    """The rows that one has right and the other wrong; None where the task has no accuracy of rows."""
    metrics: Metrics = field(default_factory=dict)
    """The task's metrics of the smaller adapter; empty where the task has none."""
    changed: Share | None = None
    """The share of the answers that differ."""
    per_token: tuple[Increase, Increase] | None = None
    """The mean divergence a token, and the share of the same top token; None where the answers are no tokens."""
    batches: int = 0

    def row(self) -> dict[str, Any]:
        """Return the measurements of the answers as fields of a row."""
        row: dict[str, Any] = {}
        if self.changed is not None:
            row |= {"changed": self.changed.mean, "changed_interval": [*self.changed.interval()]}
            row |= {"changed_at_most": self.changed.upper()}
        if self.per_token is not None:
            for name, measured in zip(("mean_kld", "same_top"), self.per_token, strict=True):
                row |= {name: measured.mean, f"{name}_interval": [*measured.interval()]}
        return row

    def lines(self) -> list[str]:
        """Write the measurements of the answers; of tokens in the words of llama.cpp."""
        lines = []
        if (share := self.changed) is not None:
            what = "next tokens" if self.per_token else "rows"
            bound = f"at most {share.upper():.2%} (95 %) on {share.rows:,} rows"
            lines.append(f"answers     {share.mean:.2%} of the {what} have another answer, {bound}")
        if self.per_token is not None:
            kld, same = self.per_token
            (low, high), (least, most) = kld.interval(), same.interval()
            lines.append(f"Mean KLD    {kld.mean:.5f} [{low:.5f}, {high:.5f}] (95 %) a token")
            most = min(1.0, most)
            lines.append(f"Same top p  {same.mean:.2%} [{least:.2%}, {most:.2%}] (95 %) of the tokens")
        return lines


@dataclass
class Answers:
    """The answers of one model to the first batches of this process, as many as were asked so far."""

    losses: list[float] = field(default_factory=list)
    predictions: Predictions = field(default_factory=list)
    rows: list[list[RowAnswers]] = field(default_factory=list)
    """Of each batch that was compared."""
    heights: list[float] = field(default_factory=list)
    """The mean logit of the top answers of each such batch."""


def answers_beside(whole: Answer, smaller: Answer, batches: Iterable[Batch], writes: bool) -> Comparison:
    """Compare two models' answers, and their logits where these are of tokens (`writes`). Each batch of this process is
    answered by both, so that no logits are kept. Empty where a model gives no answers."""
    result: list[RowAnswers] = []
    for batch in batches:
        both = [answer(batch) for answer in (whole, smaller)]
        if both[0] is None or both[1] is None:
            return Comparison()
        result += row_answers(both[0], both[1])
    result = gather_object(result)
    return Comparison(changed=share_of(result), per_token=per_token(result) if writes else None)


def _height(values: Tensor) -> float:
    return float(values.float().max(-1).values.mean())


class HeldOut:
    """The held-out batches of this process, and the answers of the whole adapter to them."""

    def __init__(self, judge: Judge, batches: Sequence[Batch], progress: Progress) -> None:
        self._judge, self._batches, self._progress = judge, batches, progress
        self._weights = [judge.samples(batch) for batch in batches]
        answers = Answers()
        self._ask(judge.whole, partial(evaluating, judge.model), answers, len(batches))
        self._answers, self._whole = answers, answers.losses
        self.metrics, self.correct = self._metrics_of(answers)
        self.batches = len(gather_object(answers.losses))
        """Of all processes together."""
        self._top: list[Tensor] = []
        """The whole adapter's answers to each batch, once they were asked."""

    @property
    def whole(self) -> list[float]:
        """Return the loss of the whole adapter on each batch of all processes."""
        return gather_object(self._whole)

    @property
    def weights(self) -> list[float]:
        """Return the samples of each batch, by which it counts."""
        return gather_object(self._weights)

    def comparison(self, cut: Cut, part: float = 1.0, answers: Answers | None = None) -> Comparison:
        """Compare the model that `cut` makes with the whole adapter, on the first rows of the held-out ones.

        Args:
            part: the part of the rows that is measured; there are metrics where it is 1.
            answers: those of an earlier call for the same model, to which this one adds the rest.
        """
        answers = Answers() if answers is None else answers
        self._ask(self._judge.losses, cut, answers, max(1, round(part * len(self._batches))))
        count = len(answers.losses)
        rise = paired(*(gather_object(each[:count]) for each in (self._whole, answers.losses, self._weights)))
        if count < len(self._batches):
            return Comparison(rise, batches=rise.batches)
        metrics, correct = self._metrics_of(answers)
        pairs = None if correct is None or self.correct is None else Pairs.of(self.correct, correct)
        return Comparison(rise, pairs, metrics, batches=rise.batches)

    def changes(self, cut: Cut, part: float = 1.0, answers: Answers | None = None) -> Comparison:
        """Count the answers that differ from the whole adapter's, of which no logits are kept; arguments as of
        `comparison`. Raises UserError: the judge's model gives no answers."""
        if not self._top:
            for values, _ in self._logits(partial(evaluating, self._judge.model)):
                self._top.append(values.argmax(-1).cpu())
                self._answers.heights.append(_height(values))
        answers = Answers() if answers is None else answers
        first, count = len(answers.rows), max(1, round(part * len(self._batches)))
        for number, (values, rows) in enumerate(self._logits(cut, first, count), first):
            answers.heights.append(_height(values))
            answers.rows.append(by_row(rows, values.argmax(-1) != self._top[number].to(rows.device), None))
        batches = gather_object(answers.rows[:count])
        return Comparison(changed=share_of([row for rows in batches for row in rows]), batches=len(batches))

    def answers(self, cut: Cut) -> Comparison:
        """Compare all answers with the whole adapter's, as `answers_beside` does."""
        both = [self._judge.answering(using) for using in (partial(evaluating, self._judge.model), cut)]
        return answers_beside(both[0], both[1], self._progress(self._batches), self._judge.writes)

    def _logits(self, cut: Cut, first: int = 0, last: int | None = None) -> Iterator[Logits]:
        """Yield what the model that `cut` makes answers to these batches."""
        with cut(), torch.no_grad():
            for batch in self._progress(self._batches[first:last]):
                if (logits := self._judge.answers(batch)) is None:
                    raise UserError(NUMBERS)
                yield logits

    def repeats(self, cut: Cut | None = None, answers: Answers | None = None) -> bool:
        """Tell whether the model that `cut` makes, by default the whole adapter, gives the first batch its earlier
        `answers` again, in every process: a layer that keeps weights of another size does not."""
        losses_of = self._judge.whole if cut is None else self._judge.losses
        using, again, earlier = cut or partial(evaluating, self._judge.model), Answers(), answers or self._answers
        if earlier.heights:  # rows without labels have no loss to go by
            now, before = [_height(values) for values, _ in self._logits(using, 0, 1)], earlier.heights
        else:
            self._ask(losses_of, using, again, 1)
            now, before = again.losses, earlier.losses
        noise = REPEATED * sum(map(abs, before)) / max(1, len(before))
        same = all(abs(x - y) <= noise for x, y in zip(now, before, strict=False))
        return all(gather_object([same]))

    def _ask(self, losses_of: Callable[..., Iterable[float]], cut: Cut, answers: Answers, count: int) -> None:
        """Have the model answer the first `count` batches of this process, but for those that it has answered."""
        batches = self._batches[len(answers.losses) : count]
        if batches:
            answers.losses += self._progress(losses_of(batches, cut, answers.predictions))

    def _metrics_of(self, answers: Answers) -> tuple[Metrics, list[bool] | None]:
        """Return the metrics of all rows, and whether each row is right."""
        predictions = gather_object(answers.predictions)
        metrics = self._judge.metrics(predictions)
        return metrics, self._judge.correct(predictions, metrics)
