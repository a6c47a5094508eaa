"""What was won, what each size costs, and whether the rank was too much, right or too little; by paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

CONFIDENCE = 0.95
"""Of every statement."""


class Increase(NamedTuple):
    """By how much the loss rises, as a mean of paired differences over batches, and how well that is known."""

    mean: float
    error: float
    """Standard error; infinite with fewer than two batches."""
    batches: int
    skew: float = 0.0
    """Skewness of the differences: positive where few batches bear the rise."""

    def upper(self, level: float = 1 - CONFIDENCE) -> float:
        """The bound that the true increase lies above with this probability at most."""
        return self.mean - _studentised(-student(level, self.batches), self.skewness) * self.error

    def lower(self, level: float = 1 - CONFIDENCE) -> float:
        """The bound that it lies below with this probability at most."""
        return self.mean - _studentised(student(level, self.batches), self.skewness) * self.error

    def interval(self) -> tuple[float, float]:
        """Where it lies with probability CONFIDENCE."""
        return self.lower((1 - CONFIDENCE) / 2), self.upper((1 - CONFIDENCE) / 2)

    @property
    def skewness(self) -> float:
        """That of the mean."""
        return self.skew / math.sqrt(max(1, self.batches))


def student(level: float, count: float) -> float:
    """How many standard errors the mean of `count` values is above the truth with probability `level` at most.

    Student's t with count - 1 degrees of freedom, by the expansion of Cornish and Fisher: within 1 % from four values
    on at the levels that are asked for here.
    """
    z, n = NormalDist().inv_cdf(1 - level), max(1, count - 1)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _studentised(t: float, skewness: float) -> float:
    """The value of (mean - truth) / error that is as unlikely, for a mean of this skewness, as `t` is for a symmetric
    one (Hall 1992, "On the removal of skewness by transformation").

    Rises that few rows bear make a sample of them look better than it is. Of rises that are just beyond the tolerance
    and borne by one row in twenty, Student's bound accepts 16 % with 8 batches and 7.5 % with 60, and this one 4 % and
    4 % (`tests/fitting/test_search.py`).
    """
    if abs(skewness) < 1e-6:
        return t
    a = skewness / 3
    inner = 1 + 3 * a * (t - a / 2)
    return (math.copysign(abs(inner) ** (1 / 3), inner) - 1) / a


def paired(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Increase:
    """Mean of the paired differences (after - before) of batches, weighted by their samples."""
    total, count = sum(weights), len(weights)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    if count < 2:
        return Increase(mean, math.inf, count)
    deviations = [w * (d - mean) for w, d in zip(weights, differences, strict=True)]
    squares, cubes = (sum(each**power for each in deviations) for power in (2, 3))
    skew = 0.0
    if count > 2 and squares > 0:
        skew = cubes / count / (squares / count) ** 1.5 * math.sqrt(count * (count - 1)) / (count - 2)
    return Increase(mean, math.sqrt(squares * count / (count - 1)) / total, count, skew)


@dataclass(frozen=True)
class Tolerance:
    """How much of what fine-tuning won may be given up."""

    won: Increase
    """Loss of the base model less that of the adapter."""
    part: float

    @property
    def loss(self) -> float:
        """The same in units of the loss."""
        return self.part * max(0.0, self.won.mean)

    @property
    def error(self) -> float:
        """Its standard error."""
        return self.part * self.won.error

    @property
    def learned(self) -> bool:
        """Whether anything was won at all: clear of zero by its noise."""
        return self.won.lower() > 0

    def allows(
        self, rise: Increase, shrink: float = 1.0, batches: int | None = None, *, doubt: float = 1 - CONFIDENCE
    ) -> bool:
        """Whether a true rise beyond the tolerance would look like this with probability `doubt` at most.

        What was won is itself a measurement, so the noise of both counts, as that of independent ones.

        Args:
            shrink: times the standard error of the rise: that of more rows, were its mean the same.
            batches: of those rows.
        """
        return self._both(rise, shrink, batches or rise.batches).upper(doubt) <= self.loss

    def forbids(self, rise: Increase) -> bool:
        """Whether a true rise within the tolerance would look like this with probability 1 - CONFIDENCE at most."""
        return self._both(rise, 1.0, rise.batches).lower() > self.loss

    def _both(self, rise: Increase, shrink: float, batches: int) -> Increase:
        """The rise with the noise of what was won beside its own, which is taken as symmetric."""
        error = math.hypot(shrink * rise.error, self.error)
        part = shrink * rise.error / error if 0 < error < math.inf else 0.0
        return Increase(rise.mean, error, batches, rise.skew * part**3)


Ranks = dict[str, int]
"""Layer -> how many of its balanced directions stay: the first ones."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer -> A `(r, in)` and B `(out, r)`; a layer of rank 0 adds nothing."""
Metrics = dict[str, float]
"""Name of a metric of the task -> its value."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One size, and all that was measured of it: by how much the loss rises, against the adapter as it is."""

    ranks: Ranks
    parameters: int
    share: float
    """Of the parameters of the whole adapter."""
    predicted: float
    """Rise of the loss that the slopes foretell of the cut, before anything makes up for it."""
    choice: Increase | None = None
    """On the rows of the choice, as it is cut."""
    recovered: Increase | None = None
    """On the rows of the choice, after steps of recovery."""
    factors: Factors | None = field(repr=False, compare=False, default=None)
    """A and B of each layer after these steps."""
    proof: Increase | None = None
    """On the rows of the proof, as this size would be taken."""
    proof_after_recovery: bool = False
    """Whether `proof` is of what has recovered."""
    metrics: Metrics = field(default_factory=dict)
    """Of the task, on the rows of the proof; none before it was asked there, or where the task has none."""
    accepted: bool | None = None
    """Whether the proof says that it is within tolerance; None: it was not asked."""

    @property
    def gains_by_recovery(self) -> bool:
        """Whether the steps lowered the upper bound of the increase; where they did not, the cut stays as it was.

        What recovers loses less, and it also says nearly what the whole adapter says, so that its loss is better known.
        """
        return self.recovered is not None and (self.choice is None or self.recovered.upper() < self.choice.upper())

    @property
    def best(self) -> Increase | None:
        """On the rows of the choice, as this size would be taken; None before it was measured."""
        return self.recovered if self.gains_by_recovery else self.choice


CAPACITY_LIMITED, FLAT, UNKNOWN, FORGETS_LESS = "capacity-limited", "flat", "unknown", "forgets less"


def verdict(
    chosen: Candidate,
    curve: Sequence[Candidate],
    tolerance: Tolerance,
    rank: int | None,
    measure: str = "loss",
    *,
    free: bool = True,
) -> tuple[str, str]:
    """Whether the rank was too much, right or too little, and the same in words for whoever chose it.

    flat: half of the parameters or less is proved to be within tolerance. capacity-limited: half clearly raises the
    loss by more. unknown: neither can be told from these rows, or nothing was learned.

    Args:
        rank: that every layer of the adapter has; None: they differ.
        measure: what rises.
        free: whether sizes are of the best directions; False where a shape was asked for, whose harm is no sign of too
            small a rank.
    """
    adapter, whole = ("its rank", "this adapter") if rank is None else (f"r = {rank}", f"r = {rank}")
    if not tolerance.learned:
        won = f"{tolerance.won.mean:+.4f} ± {tolerance.won.error:.4f}"
        return UNKNOWN, (
            f"unknown: the adapter has not lowered the {measure} beyond its noise ({won}), so nothing tells what is "
            f"needed{'; everything is kept' if chosen.share == 1 else ''}"
        )
    if chosen.accepted and chosen.share <= 0.5:
        return FLAT, f"flat: {chosen.share:.1%} of {whole} is proved to be enough for this task"
    half, quarter = _largest(curve, 0.5), _largest(curve, 0.25)
    if half is not None and half.choice is not None and half.best is not None and tolerance.forbids(half.best):
        ratio, rise = 1.0, half.choice.mean
        if not free:
            return UNKNOWN, (
                f"unknown: with half of {whole}, in the shape that was asked for, the {measure} rises by {rise:.3g}; "
                f"fit without a shape to learn whether the rank or the shape does that"
            )
        if quarter is not None and quarter.choice is not None and quarter.choice.mean > rise:
            ratio = min(1.0, rise / (quarter.choice.mean - rise))
        return CAPACITY_LIMITED, (
            f"capacity-limited: {adapter} binds; with half of it the {measure} rises by {rise:.3g}, and twice as much "
            f"might lower it by about {rise * ratio:.2g}; raise r"
        )
    if chosen.accepted:
        return UNKNOWN, (
            f"unknown: {chosen.share:.0%} of {whole} is enough, and these rows do not tell whether half is; give "
            f"more rows, or a larger tolerance"
        )
    return UNKNOWN, (
        "unknown: these rows tell neither that half is enough nor that it is too little; give more rows, or a larger "
        "tolerance"
    )


def _largest(curve: Sequence[Candidate], share: float) -> Candidate | None:
    """The largest measured size of about this share of the parameters, and no more."""
    below = [point for point in curve if point.choice is not None and share / 1.5 < point.share <= share]
    return max(below, key=lambda point: point.share, default=None)
