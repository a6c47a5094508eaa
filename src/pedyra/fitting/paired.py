"""The difference of two models on the same rows: in their losses batch by batch, in their accuracy row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from scipy.special import stdtrit

CONFIDENCE = 0.95
"""The probability with which a statement holds."""


class Increase(NamedTuple):
    """The rise of the loss: a mean of paired differences over batches."""

    mean: float
    error: float
    """Its standard error; infinite for fewer than two batches."""
    batches: int
    skew: float = 0.0
    """The skewness of the differences, positive where few batches bear the rise."""

    def upper(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that the true increase lies above with this probability at most."""
        return self.mean - _studentised(-student(level, self.batches), self.skewness) * self.error

    def lower(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that it lies below with this probability at most."""
        return self.mean - _studentised(student(level, self.batches), self.skewness) * self.error

    def interval(self) -> tuple[float, float]:
        """Return the two bounds between which it lies with probability CONFIDENCE."""
        return self.lower((1 - CONFIDENCE) / 2), self.upper((1 - CONFIDENCE) / 2)

    @property
    def skewness(self) -> float:
        """Return the skewness of the mean."""
        return self.skew / math.sqrt(max(1, self.batches))


def student(level: float, count: float) -> float:
    """Return how many standard errors the mean of `count` values is above the truth with probability `level`: the
    quantile of Student's t with count - 1 degrees of freedom."""
    return -float(stdtrit(max(1, count - 1), level))


def _studentised(t: float, skewness: float) -> float:
    """Return the value of (mean - truth) / error that is as unlikely, for a mean of this skewness, as `t` is for a
    symmetric one (Hall 1992, "On the removal of skewness by transformation").

    Rises that few rows bear make a sample of them look better than it is. Of rises that are just beyond the tolerance
    and borne by one row in twenty, this bound accepts about 5 % from 64 rows on, in the batches that a fit makes of
    them (`tests/fitting/test_paired.py`), and more with fewer (`docs/fit.md`).
    """
    if abs(skewness) < 1e-6:
        return t
    a = skewness / 3
    inner = 1 + 3 * a * (t - a / 2)
    return (math.copysign(abs(inner) ** (1 / 3), inner) - 1) / a


def paired(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Increase:
    """Average the paired differences (after - before) of batches, weighted by their samples."""
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
class Pairs:
    """The fall of the accuracy from A to B: counts of rows that one of them has right, with Tango's score interval."""

    lost: float
    """Rows that A has right and B has wrong."""
    gained: float
    """Rows that B has right and A has wrong."""
    rows: float

    @classmethod
    def of(cls, a: Sequence[bool], b: Sequence[bool]) -> Pairs:
        """Count the rows, which A and B answered in the same order."""
        both = list(zip(a, b, strict=True))
        return cls(sum(x and not y for x, y in both), sum(y and not x for x, y in both), len(both))

    @property
    def mean(self) -> float:
        """Return the fall of the accuracy from A to B."""
        return (self.lost - self.gained) / self.rows

    @property
    def error(self) -> float:
        """Return the standard error of the fall."""
        return math.sqrt(max(0.0, self.lost + self.gained - self.rows * self.mean**2)) / self.rows

    def upper(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that the true fall lies above with this probability at most, by the score test (Tango 1998):
        it holds with few rows too, and where both models are right on the same ones."""
        return self._bound(NormalDist().inv_cdf(level))

    def lower(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that it lies below with this probability at most.

        It takes a row less for lost, since counts go in steps: where few rows change, what is truly within it would
        else be called beyond in 8.9 % of cases instead of 5, and so it is in 4.4 (`test_paired.py`).
        """
        return self._bound(-NormalDist().inv_cdf(level), fewer=1)

    def change(self) -> tuple[float, float]:
        """Return the two bounds of the change of the accuracy from A to B, with probability CONFIDENCE."""
        level = (1 - CONFIDENCE) / 2
        return -self.upper(level), -self.lower(level)

    def __str__(self) -> str:
        low, high = self.change()
        return (
            f"accuracy    changes by {-100 * self.mean:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] (95 %): "
            f"{self.lost:.0f} rows lost, {self.gained:.0f} gained of {self.rows:,.0f}"
        )

    def _bound(self, z: float, fewer: int = 0) -> float:
        """Find the fall at which the score, with `fewer` rows lost, is `z`, by halving: the score falls with it."""
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if self._score(middle, fewer) > z:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _score(self, fall: float, fewer: int) -> float:
        """Return the fall that was seen less this one, in standard errors that it would have were this one true."""
        a = 2 * self.rows
        b = -self.lost - self.gained + (2 * self.rows - self.lost + self.gained) * fall
        c = -self.gained * fall * (1 - fall)
        gained = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # the likeliest share, given the fall
        variance = self.rows * (2 * gained + fall * (1 - fall))
        away = self.lost - fewer - self.gained - self.rows * fall
        return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away) if away else 0.0
