"""What was won, the smallest size that keeps it, and whether the rank binds; decided by paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch

from pedyra.fitting.curve import Point

CONFIDENCE = 0.95
"""Of every statement. Sizes are asked about from the largest down to the first that is not within tolerance. The rows
that are asked have no part in that order, so each size may be held to this alone, and still one that costs too much is
taken with probability 1 - CONFIDENCE at most (fixed-sequence test; Westfall and Krishen 2001)."""


LEARNS = 1.0
"""Standard errors by which slopes are lower than they were before they are taken to fall."""


@dataclass(frozen=True)
class Tolerance:
    """How much of what fine-tuning won may be given up."""

    won: float
    """Loss of the base model less that of the adapter."""
    won_standard_error: float
    part: float
    series: int = 1
    """Series of sizes that are asked about, which share the doubt: 2 with recovery, sizes as cut and sizes after it."""
    batches: float = math.inf
    """Batches that a cost is the mean of."""

    @property
    def loss(self) -> float:
        """The same in units of the loss."""
        return self.part * max(0.0, self.won)

    @property
    def learned(self) -> bool:
        """Whether anything was won at all: clear of zero by its noise."""
        return self.won > self.errors * self.won_standard_error

    @property
    def errors(self) -> float:
        """Standard errors between a mean and its bound."""
        return student((1 - CONFIDENCE) / self.series, self.batches)


def won(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> list[float] | None:
    """What fine-tuning has won of the loss in a run, and its standard error; None where too few batches were seen.

    The smaller of two: the fall of the loss since the beginning, in which a trained head has its part, and what the
    loss rises by without the adapter, to which a trained head has grown used. Batches tell nothing that have no sample,
    or a loss that is not finite.

    Args:
        before: of each batch of the beginning its loss, and its samples.
        now: of each batch of late its loss, its loss without the adapter, and its samples.
    """
    before, now = ([row for row in rows if math.isfinite(sum(row)) and row[-1] > 0] for rows in (before, now))
    if len(before) < 2 or len(now) < 2:
        return None

    def mean(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
        return paired([0.0] * len(rows), [row[0] for row in rows], [row[-1] for row in rows])

    (first, first_error), (last, last_error) = mean(before), mean(now)
    rounding = torch.finfo(torch.float32).eps * abs(first)
    fall = first - last, math.hypot(first_error, last_error, rounding)
    without, error = paired([row[0] for row in now], [row[1] for row in now], [row[-1] for row in now])
    return list(min(fall, (without, math.hypot(error, rounding))))


def student(level: float, count: float) -> float:
    """How many standard errors the mean of `count` values is above the truth with probability `level` at most.

    Student's t with count - 1 degrees of freedom, by the expansion of Cornish and Fisher (within 1 % from 7 on at the
    levels that are asked for here).
    """
    z, n = NormalDist().inv_cdf(1 - level), max(1, count - 1)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def paired(with_set: Sequence[float], without: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences (without - with), weighted by samples, and its standard error over batches."""
    total, count = sum(weights), len(weights)
    differences = [b - a for a, b in zip(with_set, without, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / total
    if count < 2:
        return mean, math.inf
    squares = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


class Estimate(NamedTuple):
    """A mean, and how well it is known."""

    mean: float
    error: float
    """Standard error; infinite with fewer than two values."""
    count: float
    """Values that it is known as well as the mean of."""


def controlled(
    with_set: Sequence[float],
    without: Sequence[float],
    weights: Sequence[float],
    slopes: Sequence[float],
    all_slopes: Sequence[float],
    all_weights: Sequence[float],
) -> Estimate:
    """The mean of (without - with) by control variates: of these batches, with the slopes of many more.

    To first order a batch loses what the set's gate slope c of the same batch says, with the sign turned, and that is
    nearly all of the noise: of difference + c the mean is known from few batches. The mean of c is known from every
    batch whose backward pass was seen. Where c is clearly lower in these batches than in all (the set is learning),
    all say too little, and the batches count alone. A fall that few batches cannot tell from noise goes unseen, and is
    then missing from the mean.

    Args:
        slopes: c of each of these batches.
        all_slopes: c of each batch that was seen, these too.
    """
    plain = Estimate(*paired(with_set, without, weights), len(weights))
    if len(weights) < 2:
        return plain
    zeros = [0.0] * len(all_slopes)
    here, here_error = paired(zeros[: len(slopes)], slopes, weights)
    everywhere, error = paired(zeros, all_slopes, all_weights)
    if here < everywhere - LEARNS * here_error:
        return plain
    rest, rest_error = paired(with_set, [b + c for b, c in zip(without, slopes, strict=True)], weights)
    squares = rest_error**2, error**2
    freedom = squares[0] ** 2 / (len(weights) - 1) + squares[1] ** 2 / (len(all_weights) - 1)
    count = 1 + sum(squares) ** 2 / freedom if freedom else len(weights)  # Welch and Satterthwaite
    return Estimate(rest - everywhere, math.sqrt(sum(squares)), count)


def smallest_within(curve: Sequence[Point], tolerance: Tolerance) -> Point | None:
    """The last size of the curve, from the largest down, before the first whose upper bound is beyond tolerance; None
    where there is none, or nothing was learned."""
    found = None
    for point in curve if tolerance.learned else ():
        if point.best is None or point.best[0] + tolerance.errors * point.best[1] > tolerance.loss:
            break
        found = point
    return found


CAPACITY_LIMITED, FLAT, UNKNOWN = "capacity-limited", "flat", "unknown"


def verdict(curve: Sequence[Point], tolerance: Tolerance) -> str:
    """flat: half of the parameters or less is within tolerance. capacity-limited: half clearly costs more than it.
    unknown: neither can be told from these rows, or nothing was learned."""
    if not tolerance.learned:
        return UNKNOWN
    best = smallest_within(curve, tolerance)
    if best is not None and best.share <= 0.5:
        return FLAT
    half = _half(curve)
    if half is None or half.measured is None or half.standard_error is None:
        return UNKNOWN
    return CAPACITY_LIMITED if half.measured - tolerance.errors * half.standard_error > tolerance.loss else UNKNOWN


def _half(curve: Sequence[Point], share: float = 0.5) -> Point | None:
    below = [point for point in curve if point.measured is not None and 0 < point.share <= share]
    return max(below, key=lambda point: point.share, default=None)


def in_words(curve: Sequence[Point], tolerance: Tolerance, rank: int) -> str:
    """The verdict as a sentence or two for whoever chose this rank.

    Args:
        rank: the largest of the adapter.
    """
    kind = verdict(curve, tolerance)
    if not tolerance.learned:
        return (
            f"unknown: the adapter has not lowered the loss beyond its noise ({tolerance.won:+.4f} +- "
            f"{tolerance.won_standard_error:.4f}), so nothing tells what is needed; everything is kept"
        )
    best = smallest_within(curve, tolerance)
    if kind == FLAT:
        assert best is not None
        if best.parameters == 0:
            return f"flat: r = {rank} is more than this task needs; no direction is worth the tolerance"
        times = 1 / best.share
        return f"flat: r = {rank} is {times:.3g} times what this task needs"
    half, quarter = _half(curve), _half(curve, 0.25)
    if kind == CAPACITY_LIMITED:
        assert half is not None and half.measured is not None
        ratio = 1.0
        if quarter is not None and quarter.measured is not None and quarter.measured > half.measured:
            ratio = min(1.0, half.measured / (quarter.measured - half.measured))
        return (
            f"capacity-limited: r = {rank} binds; half of it would cost {half.measured:.3g}, twice as much might save "
            f"about {half.measured * ratio:.2g}; raise r"
        )
    return (
        "unknown: these rows tell neither that half is enough nor that it is too little; give more rows, or a larger "
        "tolerance"
    )


ABOUT_HALF = 0.45
"""Of the parameters: the least that a run takes for a half, as it asks about few sets."""


def run_verdict(points: Sequence[Mapping[str, Any]], share: float, rank: int, learned: bool) -> tuple[str, str]:
    """The verdict of a run that asked about sets of directions and cut, and the sentence for whoever chose its rank.

    flat: half of the parameters or less is left. capacity-limited: a set that leaves about half or more costs too much.

    Args:
        points: the answers, see `pedyra.methods.pedyra.asking`.
        share: of the parameters at the start, that is left.
        rank: the largest at the start.
        learned: whether anything was won by the last window, see `Tolerance`.
    """
    beyond = [point for point in points if point["answer"] == "beyond"]
    largest = max(beyond, key=lambda point: point["share"], default=None)
    if share <= 0.5:
        kind = FLAT
        times = f"r = {rank} is {1 / share:.2g} times what this task needs" if share else "no rank is needed"
        words = f"flat: {times}"
    elif largest is not None and largest["share"] >= ABOUT_HALF:
        kind = CAPACITY_LIMITED
        cost = f"{largest['share']:.0%} of it would cost {largest['measured_cost']:.2g} of the loss"
        words = f"capacity-limited: r = {rank} binds; {cost}; a higher r may save more"
    else:
        kind = UNKNOWN
        kept = f"{share:.0%} is kept, and the batches do not tell whether less would do"
        words = f"unknown: {kept}; train longer, or raise the tolerance"
    if not learned and not points:  # where something was asked, an earlier window saw that something was won
        kind = UNKNOWN
        words = "unknown: the loss has not fallen beyond its noise, so nothing tells what is needed; everything is kept"
    return kind, words
