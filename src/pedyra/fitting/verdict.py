"""A tolerance says what may be given up, and a verdict whether the rank was too much, right or too little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from pedyra.fitting.heldout import Comparison
from pedyra.fitting.paired import CONFIDENCE, Increase, Pairs
from pedyra.fitting.share import Share
from pedyra.fitting.sizes import Candidate

DOUBT = 1 - CONFIDENCE
"""The probability with which a statement may be wrong."""


@dataclass(frozen=True)
class Tolerance:
    """What a smaller adapter may give up."""

    gain: Increase | None
    """The loss of the base model less that of the adapter; None where rows have no labels, and so no loss."""
    value: float
    of: str = "gain"
    """The loss may rise by `value` times the "gain", the "accuracy" may fall by it (0.005 is half a point), or this
    share of the "answers" may differ from the whole adapter's."""

    @property
    def loss(self) -> float:
        """Return by how much the loss may rise."""
        return self.value * max(0.0, self.gain.mean) if self.gain else 0.0

    @property
    def limit(self) -> float:
        """Return the most that may be measured: of the answers, the accuracy or the loss."""
        return self.loss if self.of == "gain" else self.value

    @property
    def learned(self) -> bool:
        """Tell whether the gain, where the tolerance is a part of it, is clearly above 0."""
        return self.of != "gain" or (self.gain is not None and self.gain.lower() > 0)

    def allows(self, comparison: Comparison, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly beyond the tolerance would look like this with probability `doubt` at most."""
        return self.estimate(comparison).upper(doubt) <= self.limit

    def forbids(self, comparison: Comparison, doubt: float = DOUBT) -> bool:
        """Tell whether what is truly within the tolerance would look like this with probability `doubt` at most."""
        return self.estimate(comparison).lower(doubt) > self.limit

    def rows_needed(self, comparison: Comparison) -> float:
        """Return how many times as many rows would tell, in 80 % of cases, on which side of the tolerance this is, if
        the measured value is the true one."""
        estimate, normal = self.estimate(comparison), NormalDist()
        away = self.limit - estimate.mean
        return ((normal.inv_cdf(1 - DOUBT) + normal.inv_cdf(0.8)) * estimate.error / away) ** 2 if away else math.inf

    def estimate(self, comparison: Comparison) -> Increase | Pairs | Share:
        """Return what is compared with the tolerance: the rise of the loss, the fall of the accuracy, or the share of
        the answers that change.

        The gain is a measurement too. So the rise has its noise as well, taken as independent and symmetric.
        """
        if self.of != "gain":
            estimate = comparison.changed if self.of == "answers" else comparison.pairs
            assert estimate is not None, f"the {self.of} is measured where the tolerance is of it"
            return estimate
        rise = comparison.rise
        assert rise is not None, "losses are compared where the tolerance is of them"
        error = math.hypot(rise.error, self.value * self.gain.error if self.gain else 0.0)
        part = rise.error / error if 0 < error < math.inf else 0.0
        return Increase(rise.mean, error, rise.batches, rise.skew * part**3)

    def next_allowing(self, comparison: Comparison) -> str | None:
        """Return the next larger tolerance of this kind that allows this, in tenths of a percent of the answers or of a
        point, or in whole percent."""
        step = 100 if self.of == "gain" else 1000
        larger = range(math.floor(self.value * step + 1e-9) + 1, step)
        tolerances = (replace(self, value=number / step) for number in larger)
        return next((str(tolerance) for tolerance in tolerances if tolerance.allows(comparison)), None)

    def says(self, comparison: Comparison, measure: str = "loss") -> str:
        """Say the estimate in words."""
        mean = self.estimate(comparison).mean
        return {
            "answers": f"{mean:.2%} of the answers change",
            "accuracy": f"the accuracy falls by {100 * mean:.3g} points",
            "gain": f"the {measure} rises by {mean:.3g}",
        }[self.of]

    def __str__(self) -> str:
        """Write it as a request has it: 1%, or 0.5pt."""
        return f"{100 * self.value:.3g}{'pt' if self.of == 'accuracy' else '%'}"


CAPACITY_LIMITED, FLAT, UNKNOWN = "capacity-limited", "flat", "unknown"
HALF = 0.4
"""A size counts as half or more from this part of the parameters on: an odd rank has no half."""


def verdict(
    chosen: Candidate, curve: Sequence[Candidate], tolerance: Tolerance, measure: str = "loss"
) -> tuple[str, str]:
    """Say whether the rank was more than this task needs, in a word and as a sentence.

    flat: half of the parameters or less is proved to be within tolerance. capacity-limited: a size of half or more is
    clearly beyond it. unknown: these rows tell neither, or the adapter has no gain.
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
    """Say how many times as many rows would tell, or which tolerance would allow the size that was not proved."""
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
    """Name the smallest tolerance of each other kind that would allow the largest size, where a fit kept everything;
    empty where there is none."""
    largest = next((each for each in curve if each.proof is not None), None)
    if chosen.share < 1 or largest is None or largest.proof is None:
        return ""
    proof = largest.proof
    message = []
    for of, estimate in {"answers": proof.changed, "accuracy": proof.pairs, "gain": proof.rise}.items():
        other = Tolerance(tolerance.gain, 0.0, of)
        if estimate is not None and of != tolerance.of and other.learned and (least := other.next_allowing(proof)):
            message.append(f"{'changed' if of == 'answers' else 'tolerance'} {least}")
    return f"; asked otherwise, {' or '.join(message)} would allow rank {largest.rank}" if message else ""
