"""A share of answers is a mean over rows, and its bounds are those of a share that was counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import betaincinv

from pedyra.fitting.paired import CONFIDENCE


class Share(NamedTuple):
    """The mean, over rows, of the part of a row's answers that changes.

    The bounds are Clopper and Pearson's where each row has one answer. Where it has many, which depend on each other,
    they are those of Korn and Graubard (1998, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data"): a row is the unit, and the count is that of as many independent
    answers as would make the error that was seen.
    """

    mean: float
    error: float
    """The standard error of the mean, by the spread of the rows."""
    rows: int

    @classmethod
    def of(cls, parts: Sequence[float]) -> Share:
        """Average the parts of rows, each from 0 to 1."""
        mean = sum(parts) / len(parts)
        return cls(mean, math.sqrt(sum((part - mean) ** 2 for part in parts)) / len(parts), len(parts))

    @property
    def independent(self) -> int:
        """Return how many independent answers would know the share as well; without any spread, one a row."""
        return self.rows if self.error <= 0 else max(1, round(self.mean * (1 - self.mean) / self.error**2))

    def upper(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that the true share lies above with this probability at most."""
        return _bound(self.mean * self.independent, self.independent, level)

    def lower(self, level: float = 1 - CONFIDENCE) -> float:
        """Return the bound that it lies below with this probability at most."""
        return 1 - _bound((1 - self.mean) * self.independent, self.independent, level)

    def interval(self) -> tuple[float, float]:
        """Return the two bounds between which it lies with probability CONFIDENCE."""
        return self.lower((1 - CONFIDENCE) / 2), self.upper((1 - CONFIDENCE) / 2)


def _bound(count: float, trials: int, level: float) -> float:
    """Return the share of which `count` successes or fewer in so many trials have this probability; the count may lie
    between two whole ones."""
    return 1.0 if count >= trials else float(betaincinv(count + 1, trials - count, 1 - level))
