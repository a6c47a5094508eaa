"""A tolerance says what may be given up, and a verdict whether the rank was too much, right or too little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from pedyra.fitting.held import Against
from pedyra.fitting.paired import CONFIDENCE, Increase
from pedyra.fitting.sizes import Candidate

DOUBT = 1 - CONFIDENCE
"""A statement may be wrong with this probability."""


@dataclass(frozen=True)
class Tolerance:
    """A part of what fine-tuning won may be given up or, where `points` are given, of the accuracy."""

    won: Increase
    """The loss of the adapter is below that of the base model by this."""
    part: float
    points: float | None = None
    """The accuracy may fall by this: 0.005 is half a point."""

    @property
    def loss(self) -> float:
        """Return by how much the loss may rise."""
        return self.part * max(0.0, self.won.mean)

    @property
    def error(self) -> float:
        """Return the standard error of `loss`."""
        return self.part * self.won.error

    @property
    def learned(self) -> bool:
        """Tell whether anything was won at all, clear of noise; points of the accuracy can be given up in any case."""
        return self.points is not None or self.won.lower() > 0

    def allows(self, found: Against, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly beyond the tolerance would look like this with probability `doubt` at most.

        What was won is itself a measurement, so the noise of both counts, as that of independent ones.
        """
        if self.points is not None:
            return _fall(found, doubt)[1] <= self.points
        return self._both(found.rise).upper(doubt) <= self.loss

    def forbids(self, found: Against, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly within the tolerance would look like this with probability `doubt` at most."""
        if self.points is not None:
            return _fall(found, doubt)[0] > self.points
        return self._both(found.rise).lower(doubt) > self.loss

    def rows_needed(self, found: Against) -> float:
        """Return how many times as many rows like these would tell, in 80 % of cases, on which side of the tolerance
        this is, if it is truly where it was measured."""
        if self.points is not None and found.pairs is not None:
            away, error = self.points - found.pairs.fall, found.pairs.error
        else:
            away, error = self.loss - found.rise.mean, self._both(found.rise).error
        normal = NormalDist()
        return ((normal.inv_cdf(1 - DOUBT) + normal.inv_cdf(0.8)) * error / away) ** 2 if away else math.inf

    def next_allowing(self, found: Against) -> str | None:
        """Return the next larger tolerance that allows this, in whole percent or in tenths of a point."""
        if self.points is None:
            larger = ((f"{n}%", replace(self, part=n / 100)) for n in range(1, 100) if n / 100 > self.part)
        else:
            points = self.points
            larger = ((f"{n / 10:g}pt", replace(self, points=n / 1000)) for n in range(1, 1000) if n / 1000 > points)
        return next((told for told, tolerance in larger if tolerance.allows(found)), None)

    def _both(self, rise: Increase) -> Increase:
        """Return the rise with the noise of what was won, taken as symmetric, beside its own."""
        error = math.hypot(rise.error, self.error)
        part = rise.error / error if 0 < error < math.inf else 0.0
        return Increase(rise.mean, error, rise.batches, rise.skew * part**3)


def _fall(found: Against, doubt: float) -> tuple[float, float]:
    """Return the two one-sided bounds of the fall of the accuracy."""
    assert found.pairs is not None, "points of the accuracy are asked only where the task has one"
    return found.pairs.bounds(NormalDist().inv_cdf(1 - doubt))


CAPACITY_LIMITED, FLAT, UNKNOWN = "capacity-limited", "flat", "unknown"
HALF = 0.4
"""A size counts as half or more from this part of the parameters on: an odd rank has no half."""


def verdict(
    taken: Candidate, curve: Sequence[Candidate], tolerance: Tolerance, measure: str = "loss"
) -> tuple[str, str]:
    """Say whether the rank was more than this task needs, in a word and as a sentence.

    flat: half of the parameters or less is proved to be within tolerance. capacity-limited: a size of half or more is
    clearly beyond it. unknown: neither can be told from these rows, or nothing was learned.
    """
    if not tolerance.learned:
        won = f"{tolerance.won.mean:+.4f} ± {tolerance.won.error:.4f}"
        return UNKNOWN, (
            f"unknown: the adapter has not lowered the {measure} beyond its noise ({won}), so nothing tells what is "
            f"needed{'; everything is kept' if taken.share == 1 else ''}. Is this the base that it was trained on?"
        )
    if taken.accepted and taken.share <= 0.5:
        return FLAT, f"flat: {taken.share:.1%} of the adapter is proved to be enough for this task"
    beyond = [each for each in curve if each.share >= HALF and each.proof and tolerance.forbids(each.proof)]
    if beyond:
        worst = max(beyond, key=lambda each: each.share)
        assert worst.proof is not None
        return CAPACITY_LIMITED, (
            f"capacity-limited: {worst.share:.0%} of the adapter is clearly beyond the tolerance; with it the "
            f"{measure} rises by {worst.proof.rise.mean:.3g}"
        )
    told = "unknown: these rows tell neither that half is enough nor that it is too little"
    return UNKNOWN, f"{told}; {_missing(curve, tolerance)}"


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
