"""Which sets of directions may go: asked of batches one by one, until each answer is sure enough.

A question is one set. Every batch tells the loss with and without it, and the slope of the set's gate, which was seen
in the steps before as well (`controlled`). After 8, 16 and 32 batches the mean difference and its standard error are
looked at: the set may go where the upper bound is within tolerance, and must stay where the lower bound is beyond it,
or 32 batches cannot tell. The next question lies between what may go and what must stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pedyra.fitting.curve import Prefixes
from pedyra.fitting.gramians import Calibration
from pedyra.fitting.verdict import Estimate, controlled, student
from pedyra.fitting.worth import mean_slopes

DOUBT = 0.05
"""Probability, over all looks of a run, that one set is let go that costs more than tolerance."""
LOOKS = 16
"""Looks in a run, each of which may use an equal part of the doubt."""
FEWEST, MOST = 8, 32
"""Batches of a question. A standard error of fewer is worth little; when so many do not tell, a smaller set is next."""
LARGEST_CUT = 1 / 8
"""Part of the parameters that one cut leaves at least: what is predicted for fewer has been far too low."""
NEAR = 0.9
"""A set is not asked about that leaves more than this part of what may stay already."""
LEARNING = 3.0
"""Standard errors by which the slopes of all of a layer's gates together are below zero in a layer that still learns:
more of what it has would save more, so none of it goes."""
KEPT = ("tolerance", "may_go", "cost_of_it", "must_stay")
"""Attributes that a checkpoint has as they are."""


def still_learning(calibration: Calibration, tolerance: float = 0.0) -> list[str]:
    """Layers along all of whose gates together the loss still falls: clear of the noise of the window's steps, and for
    twice of them by more than an equal part of the tolerance."""
    layers, samples = calibration.layers, calibration.samples
    if len(samples) < 2:
        return list(layers)
    mean, error = mean_slopes(torch.stack([layer.slopes.sum(1) for layer in layers.values()], 1), samples)
    falls = mean < -(LEARNING * error).clamp_min(tolerance / len(layers))
    return [name for name, each in zip(layers, falls.tolist(), strict=True) if each]


@dataclass
class Question:
    """One set, and what the batches so far say of it: one value a batch."""

    removals: int
    whole: list[float] = field(default_factory=list)
    """The loss with everything."""
    without: list[float] = field(default_factory=list)
    """The loss without the set."""
    samples: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    """c of the set."""


@dataclass
class Account:
    """What a run has asked so far; plain values, for JSON."""

    most_batches: int
    """Steps in which something may be asked."""
    batches: int = 0
    looks: int = 0
    spent: float = 0.0
    """What the sets that went cost of the loss, when they went."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Every answer, in parts of the parameters that the run began with."""

    @property
    def is_exhausted(self) -> bool:
        return self.batches >= self.most_batches or self.looks >= LOOKS


class Asking:
    """The questions of one round.

    Args:
        prefixes: the sets.
        tolerance: of the loss, that is left.
        account: of the run.
        initial: parameters that the run began with.
    """

    def __init__(self, prefixes: Prefixes, tolerance: float, account: Account, initial: int) -> None:
        self.prefixes, self.tolerance, self.account, self.initial = prefixes, tolerance, account, initial
        self.slopes, self.samples = prefixes.slopes, prefixes.calibration.samples.clone()  # a checkpoint has both
        """c of every set in the steps of the window and since, `(steps, removals + 1)`, and the steps' samples."""
        self.may_go, self.cost_of_it = 0, 0.0
        """The most removals that surely cost no more than tolerance, and what they cost."""
        self.must_stay: int | None = None
        """The fewest that were found to, or of which it could not be told."""
        self.question: Question | None = None
        self._most = prefixes.of_parameters(round(LARGEST_CUT * prefixes.parameters[0]))
        self._ask(min(self._most, prefixes.within(tolerance)))

    def _ask(self, removals: int) -> None:
        """About these, or the most that can be proved; unless that is answered, or nearly so."""
        removals = min(removals, self._provable())
        is_open = self.may_go < removals < (self.must_stay or removals + 1)
        if is_open and self.prefixes.parameters[removals] <= NEAR * self.prefixes.parameters[self.may_go]:
            self.question = Question(removals)

    def _provable(self) -> int:
        """The most removals whose mean slope is known to within tolerance, from the steps so far."""
        if len(self.samples) < 2:
            return 0
        _, error = mean_slopes(self.slopes, self.samples)
        known = student(DOUBT / LOOKS, len(self.samples)) * error <= self.tolerance
        return int(known.nonzero().max())

    def tell(self, whole: float, without: float, samples: float, slopes: Tensor) -> None:
        """One more batch of the question; it tells nothing where a loss is not finite.

        Args:
            slopes: c of every set in this batch, `(removals + 1,)`.
        """
        question, account = self.question, self.account
        assert question is not None
        account.batches += 1
        told = math.isfinite(whole) and math.isfinite(without) and samples > 0
        if told:
            question.whole.append(whole)
            question.without.append(without)
            question.samples.append(samples)
            question.slopes.append(float(slopes[question.removals]))
            self.slopes = torch.cat([self.slopes, slopes[None].to(self.slopes)])
            self.samples = torch.cat([self.samples, self.samples.new_tensor([samples])])
        count = len(question.samples)
        is_time = told and count >= FEWEST and count & (count - 1) == 0
        if is_time or account.is_exhausted:
            self._look(question)

    def _look(self, question: Question) -> None:
        """Whether the batches so far are an answer, and what to ask next."""
        self.account.looks += 1
        cost = self._cost(question)
        answer = self._answer(cost)
        if answer == "open" and len(question.samples) < MOST and not self.account.is_exhausted:
            return
        self.account.points.append(self._point(question, answer, cost))
        self.question = None
        if answer == "within":
            self.may_go, self.cost_of_it = question.removals, max(0.0, cost.mean)
        else:
            self.must_stay = question.removals
        if not self.account.is_exhausted:
            self._ask(self._most if self.must_stay is None else self._between(question.removals, cost, self.must_stay))

    def _cost(self, question: Question) -> Estimate:
        """Mean rise of the loss without the set."""
        if len(question.samples) < FEWEST:  # those of the last question may be
            return Estimate(0.0, math.inf, len(question.samples))
        everywhere = self.slopes[:, question.removals].tolist(), self.samples.tolist()
        return controlled(question.whole, question.without, question.samples, question.slopes, *everywhere)

    def _answer(self, cost: Estimate) -> str:
        """within, beyond or open, as far as the batches tell."""
        if cost.mean + student(DOUBT / LOOKS, cost.count) * cost.error <= self.tolerance:
            return "within"
        return "beyond" if cost.mean - student(0.05, cost.count) * cost.error > self.tolerance else "open"

    def _between(self, removals: int, cost: Estimate, must_stay: int) -> int:
        """Where the cost that was just measured would be half of the tolerance, or else in the middle by ratio."""
        if removals == must_stay and cost.mean > 2 * cost.error:
            guess = self.prefixes.costing(self.tolerance / 2, removals, cost.mean)
            if self.may_go < guess < must_stay:
                return guess
        fewest, most = self.prefixes.parameters[must_stay], self.prefixes.parameters[self.may_go]
        return self.prefixes.of_parameters(round(math.sqrt(most * max(1, fewest))))

    def _point(self, question: Question, answer: str, cost: Estimate) -> dict[str, Any]:
        """The answer, for the record."""
        parameters = self.prefixes.parameters[question.removals]
        return {
            "of": self.prefixes.parameters[0],
            "parameters": parameters,
            "share": parameters / self.initial,
            "answer": answer,
            "predicted_cost": self.prefixes.predicted[question.removals],
            "measured_cost": cost.mean,
            "standard_error": cost.error if math.isfinite(cost.error) else None,
            "tolerance": self.tolerance,
            "batches": len(question.samples),
        }

    def values(self) -> dict[str, Any]:
        """The state as plain values, for JSON."""
        return {**{name: getattr(self, name) for name in KEPT}, "question": self.question and asdict(self.question)}

    def tensors(self) -> dict[str, Tensor]:
        """What the sets come from, and the slopes since, for a checkpoint."""
        since = {"asking.slopes": self.slopes, "asking.samples": self.samples}
        return self.prefixes.calibration.tensors() | since

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `values` and `tensors`."""
        self.slopes, self.samples = tensors["asking.slopes"], tensors["asking.samples"]
        for name in KEPT:
            setattr(self, name, values[name])
        self.question = None if values["question"] is None else Question(**values["question"])
