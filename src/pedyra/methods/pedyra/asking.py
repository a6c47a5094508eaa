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

from pedyra.fit.verdict import Estimate, controlled, student
from pedyra.methods.pedyra.sizes import Sizes

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


@dataclass
class Question:
    """One set, and what the batches so far say of it."""

    removals: int
    whole: list[float] = field(default_factory=list)
    """The loss of each batch with everything."""
    without: list[float] = field(default_factory=list)
    """The loss of each batch without the set."""
    samples: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    """c of the set in each batch."""


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
        sizes: the sets.
        tolerance: of the loss, that is left.
        account: of the run.
        initial: parameters that the run began with.
    """

    def __init__(self, sizes: Sizes, tolerance: float, account: Account, initial: int) -> None:
        self.sizes, self.tolerance, self.account, self.initial = sizes, tolerance, account, initial
        self.slopes, self.samples = sizes.slopes, sizes.calibration.samples.clone()
        """c of every set in the steps of the window and since, `(steps, removals + 1)`, and the steps' samples."""
        self.may_go, self.cost_of_it = 0, 0.0
        """The most removals that surely cost no more than tolerance, and what they cost."""
        self.must_stay: int | None = None
        """The fewest that were found to, or of which it could not be told."""
        self.question: Question | None = None
        self._most = sizes.of_parameters(round(LARGEST_CUT * sizes.after(0).parameters))
        self._ask(min(self._most, sizes.within(tolerance)))

    def tell(self, whole: float, without: float, samples: float, slopes: Tensor) -> None:
        """One more batch of the question; it tells nothing where a loss is not finite.

        Args:
            slopes: c of every set in this batch, `(removals + 1,)`.
        """
        assert self.question is not None
        question, account = self.question, self.account
        told = math.isfinite(whole) and math.isfinite(without) and samples > 0
        if told:
            question.whole.append(whole)
            question.without.append(without)
            question.samples.append(samples)
            question.slopes.append(float(slopes[question.removals]))
            self.slopes = torch.cat([self.slopes, slopes[None].to(self.slopes)])
            self.samples = torch.cat([self.samples, self.samples.new_tensor([samples])])
        account.batches += 1
        count = len(question.samples)
        is_time = told and count >= FEWEST and count & (count - 1) == 0
        if not is_time and not account.is_exhausted:
            return
        account.looks += 1
        cost = self._cost(question)
        answer = self._answer(cost)
        if answer == "open" and count < MOST and not account.is_exhausted:
            return
        account.points.append(self._point(question, answer, cost))
        self.question = None
        if answer == "within":
            self.may_go, self.cost_of_it = question.removals, max(0.0, cost.mean)
        else:
            self.must_stay = question.removals
        if not account.is_exhausted:
            self._ask(self._most if self.must_stay is None else self._between(question, cost))

    def _provable(self) -> int:
        """The most removals whose mean slope is known to within tolerance, from the steps so far."""
        if len(self.samples) < 2:
            return 0
        steps, weights = len(self.samples), self.samples[:, None] / self.samples.sum()
        mean = (weights * self.slopes).sum(0)
        error = ((weights * (self.slopes - mean)).square().sum(0) * steps / (steps - 1)).sqrt()
        known = student(DOUBT / LOOKS, steps) * error <= self.tolerance
        return int(known.nonzero().max())

    def _cost(self, question: Question) -> Estimate:
        """Mean rise of the loss without the set."""
        if len(question.samples) < FEWEST:  # those of the last question may be
            return Estimate(0.0, math.inf, len(question.samples))
        everywhere = self.slopes[:, question.removals].tolist(), self.samples.tolist()
        return controlled(question.whole, question.without, question.samples, question.slopes, *everywhere)

    def _answer(self, cost: Estimate) -> str:
        """within, beyond or open, as far as the batches tell."""
        mean, error, count = cost
        if mean + student(DOUBT / LOOKS, count) * error <= self.tolerance:
            return "within"
        return "beyond" if mean - student(0.05, count) * error > self.tolerance else "open"

    def _between(self, last: Question, found: Estimate) -> int:
        """Where the cost that was just measured would be half of the tolerance, or else in the middle by ratio."""
        assert self.must_stay is not None
        cost, error, _ = found
        if last.removals == self.must_stay and cost > 2 * error:
            guess = self.sizes.costing(self.tolerance / 2, last.removals, cost)
            if self.may_go < guess < self.must_stay:
                return guess
        fewest, most = (self.sizes.after(each).parameters for each in (self.must_stay, self.may_go))
        return self.sizes.of_parameters(round(math.sqrt(most * max(1, fewest))))

    def _ask(self, removals: int) -> None:
        """About these, or the most that can be proved; unless that is answered, or nearly so."""
        removals = min(removals, self._provable())
        if not self.may_go < removals < (self.must_stay or removals + 1):
            return
        if self.sizes.after(removals).parameters <= NEAR * self.sizes.after(self.may_go).parameters:
            self.question = Question(removals)

    def _point(self, question: Question, answer: str, found: Estimate) -> dict[str, Any]:
        size, (cost, error, _) = self.sizes.after(question.removals), found
        return {
            "of": self.sizes.after(0).parameters,
            "parameters": size.parameters,
            "share": size.parameters / self.initial,
            "answer": answer,
            "predicted_cost": size.predicted,
            "measured_cost": cost,
            "standard_error": error if math.isfinite(error) else None,
            "tolerance": self.tolerance,
            "batches": len(question.samples),
        }

    def values(self) -> dict[str, Any]:
        """The state as plain values, for JSON."""
        question = None if self.question is None else asdict(self.question)
        return {
            "tolerance": self.tolerance, "may_go": self.may_go, "cost_of_it": self.cost_of_it,
            "must_stay": self.must_stay, "question": question,
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The slopes, for a checkpoint."""
        return {"asking.slopes": self.slopes, "asking.samples": self.samples}

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `values` and `tensors`."""
        self.slopes, self.samples = tensors["asking.slopes"], tensors["asking.samples"]
        for name in ("tolerance", "may_go", "cost_of_it", "must_stay"):
            setattr(self, name, values[name])
        self.question = None if values["question"] is None else Question(**values["question"])
