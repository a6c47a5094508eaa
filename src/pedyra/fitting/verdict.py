"""A tolerance says what may be given up, and a verdict whether the rank was too much, right or too little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from pedyra.fitting.heldout import Comparison
from pedyra.fitting.paired import CONFIDENCE, Increase
from pedyra.fitting.sizes import Candidate

DOUBT = 1 - CONFIDENCE
"""A statement may be wrong with this probability."""


@dataclass(frozen=True)
class Tolerance:
    """A part of what fine-tuning won may be given up or, where `points` are given, of the accuracy; or, where `changed`
    is, this share of the answers may be others than the whole adapter's."""

    gain: Increase | None = None
    """The loss of the adapter is below that of the base model by this; None where rows have no labels, which tell no
    loss."""
    part: float = 0.01
    points: float | None = None
    """The accuracy may fall by this: 0.005 is half a point."""
    changed: float | None = None

    @property
    def loss(self) -> float:
        """Return by how much the loss may rise."""
        return self.part * max(0.0, self.gain.mean) if self.gain else 0.0

    @property
    def error(self) -> float:
        """Return the standard error of `loss`."""
        return self.part * self.gain.error if self.gain else 0.0

    @property
    def of_loss(self) -> bool:
        """Tell whether the loss decides."""
        return self.points is None and self.changed is None

    @property
    def limit(self) -> float:
        """Return the most that may be measured: of the answers, the accuracy or the loss."""
        return next((each for each in (self.changed, self.points) if each is not None), self.loss)

    @property
    def learned(self) -> bool:
        """Tell whether anything was won at all, clear of noise, where the tolerance is a part of it."""
        return not self.of_loss or (self.gain is not None and self.gain.lower() > 0)

    def allows(self, comparison: Comparison, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly beyond the tolerance would look like this with probability `doubt` at most."""
        return self.bounds(comparison, doubt)[1] <= self.limit

    def forbids(self, comparison: Comparison, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly within the tolerance would look like this with probability `doubt` at most."""
        return self.bounds(comparison, doubt)[0] > self.limit

    def bounds(self, comparison: Comparison, doubt: float = DOUBT) -> tuple[float, float]:
        """Return the two one-sided bounds of what is held to the tolerance.

        What was won is itself a measurement, so the noise of both counts, as that of independent ones.
        """
        if self.changed is not None:
            assert comparison.changed is not None, "answers are compared where the tolerance is of them"
            return comparison.changed.lower(doubt), comparison.changed.upper(doubt)
        if self.points is not None:
            assert comparison.pairs is not None, "points of the accuracy are asked only where the task has one"
            return comparison.pairs.bounds(NormalDist().inv_cdf(1 - doubt))
        rise = self._both(comparison)
        return rise.lower(doubt), rise.upper(doubt)

    def rows_needed(self, comparison: Comparison) -> float:
        """Return how many times as many rows like these would tell, in 80 % of cases, on which side of the tolerance
        this is, if it is truly where it was measured."""
        value, error = self.estimate(comparison)
        away, normal = self.limit - value, NormalDist()
        return ((normal.inv_cdf(1 - DOUBT) + normal.inv_cdf(0.8)) * error / away) ** 2 if away else math.inf

    def estimate(self, comparison: Comparison) -> tuple[float, float]:
        """Return what is held to the tolerance, and its standard error."""
        if self.changed is not None and comparison.changed is not None:
            return comparison.changed.mean, comparison.changed.error
        if self.points is not None and comparison.pairs is not None:
            return comparison.pairs.fall, comparison.pairs.error
        rise = self._both(comparison)
        return rise.mean, rise.error

    def next_allowing(self, comparison: Comparison) -> str | None:
        """Return the next larger tolerance of this kind that allows this, in tenths of a percent of the answers or of a
        point, or in whole percent."""
        name = "changed" if self.changed is not None else "part" if self.points is None else "points"
        unit, step = {"changed": ("%", 1000), "points": ("pt", 1000), "part": ("%", 100)}[name]
        smallest = math.floor(getattr(self, name) * step + 1e-9) + 1
        larger = ((number, replace(self, **{name: number / step})) for number in range(smallest, step))
        number = next((number for number, tolerance in larger if tolerance.allows(comparison)), None)
        return None if number is None else f"{number / step * 100:g}{unit}"

    def says(self, comparison: Comparison, measure: str = "loss") -> str:
        """Say what was measured of what is held to the tolerance."""
        value, _ = self.estimate(comparison)
        if self.changed is not None:
            return f"{value:.2%} of the answers change"
        return (
            f"the accuracy falls by {100 * value:.3g} points" if self.points else f"the {measure} rises by {value:.3g}"
        )

    def __str__(self) -> str:
        """Write it as it is asked."""
        if self.changed is not None:
            return f"{100 * self.changed:.3g}%"
        return f"{100 * self.points:.3g}pt" if self.points is not None else f"{100 * self.part:.3g}%"

    def _both(self, comparison: Comparison) -> Increase:
        """Return the rise with the noise of what was won, taken as symmetric, beside its own."""
        rise = comparison.rise
        assert rise is not None, "losses are compared where the tolerance is of them"
        error = math.hypot(rise.error, self.error)
        part = rise.error / error if 0 < error < math.inf else 0.0
        return Increase(rise.mean, error, rise.batches, rise.skew * part**3)


CAPACITY_LIMITED, FLAT, UNKNOWN = "capacity-limited", "flat", "unknown"
HALF = 0.4
"""A size counts as half or more from this part of the parameters on: an odd rank has no half."""


def verdict(
    chosen: Candidate, curve: Sequence[Candidate], tolerance: Tolerance, measure: str = "loss"
) -> tuple[str, str]:
    """Say whether the rank was more than this task needs, in a word and as a sentence.

    flat: half of the parameters or less is proved to be within tolerance. capacity-limited: a size of half or more is
    clearly beyond it. unknown: neither can be told from these rows, or nothing was learned.
    """
    if (gain := tolerance.gain) is not None and not tolerance.learned:
        return UNKNOWN, (
            f"unknown: the adapter has not lowered the {measure} beyond its noise ({gain.mean:+.4f} ± "
            f"{gain.error:.4f}), so nothing tells what is needed"
            f"{'; everything is kept' if chosen.share == 1 else ''}. Is this the base that it was trained on?"
        )
    if chosen.accepted and chosen.share <= 0.5:
        return FLAT, f"flat: {chosen.share:.1%} of the adapter is proved to be enough for this task"
    beyond = [each for each in curve if each.proof and tolerance.forbids(each.proof)]
    ways = otherwise(chosen, curve, tolerance)
    if halves := [each for each in beyond if each.share >= HALF]:
        worst = max(halves, key=lambda each: each.share)
        assert worst.proof is not None
        message = f"{worst.share:.0%} of the adapter is clearly beyond the tolerance"
        return CAPACITY_LIMITED, f"capacity-limited: {message}; with it {tolerance.says(worst.proof, measure)}{ways}"
    if chosen in beyond and chosen.proof is not None:  # it was asked for
        return UNKNOWN, (
            f"unknown: rank {chosen.rank} is clearly beyond the tolerance: {tolerance.says(chosen.proof, measure)}; no "
            f"larger one was asked"
        )
    message = "unknown: these rows tell neither that half is enough nor that it is too little"
    return UNKNOWN, f"{message}; {_missing(curve, tolerance)}{ways}"


def _missing(curve: Sequence[Candidate], tolerance: Tolerance) -> str:
    """Say what would tell: how many times as many rows, or which tolerance would allow the size that was not proved."""
    more, larger = "give more rows", "a larger tolerance"
    undecided = next((each for each in curve if each.proof and not each.accepted), None)
    if undecided is not None and undecided.proof is not None:
        times, enough = tolerance.rows_needed(undecided.proof), tolerance.next_allowing(undecided.proof)
        if times <= 100:
            more = f"some {max(2, math.ceil(times))} times as many would tell"
        if enough is not None:
            larger = f"a tolerance of {enough} would allow rank {undecided.rank}"
    return f"{more}, or {larger}"


def otherwise(chosen: Candidate, curve: Sequence[Candidate], tolerance: Tolerance) -> str:
    """Name the other ways to ask of a fit that kept everything, with the least that these rows would allow in each for
    the largest size that was asked; empty where there is none."""
    largest = next((each for each in curve if each.proof is not None), None)
    if chosen.share < 1 or largest is None or largest.proof is None:
        return ""
    comparison, ways = largest.proof, []
    if comparison.changed is not None and tolerance.changed is None:
        ways.append(("changed", Tolerance(tolerance.gain, changed=0.0)))
    if comparison.pairs is not None and tolerance.points is None:
        ways.append(("tolerance", Tolerance(tolerance.gain, points=0.0)))
    if comparison.rise is not None and not tolerance.of_loss and tolerance.gain and tolerance.gain.lower() > 0:
        ways.append(("tolerance", Tolerance(tolerance.gain, part=0.0)))
    message = [f"{name} {least}" for name, way in ways if (least := way.next_allowing(comparison)) is not None]
    return f"; asked otherwise, {' or '.join(message)} would allow rank {largest.rank}" if message else ""
