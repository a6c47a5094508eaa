"""A share of answers is a mean over rows, and its bounds are those of a share that was counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from pedyra.fitting.paired import CONFIDENCE


class Share(NamedTuple):
    """Rows have parts of their answers changed, and this is the mean of these parts.

    The bounds are Clopper and Pearson's where each row has one answer. Where it has many, which depend on each other,
    they are those of Korn and Graubard (1998, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data"): a row is the unit, and the count is that of as many independent
    answers as would make the error that was seen.
    """

    mean: float
    error: float
    """The standard error of the mean is this, by the spread of the rows."""
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
    """Return the share of which `count` successes or fewer in so many trials have this probability, between those of
    the whole numbers beside a count that is none."""
    whole = min(math.floor(count + 1e-9), trials)
    fraction = max(0.0, count - whole)
    below = _whole_bound(whole, trials, level)
    return below if fraction < 1e-6 else below + fraction * (_whole_bound(whole + 1, trials, level) - below)


@lru_cache(4096)  # a search asks for the same few
def _whole_bound(count: int, trials: int, level: float) -> float:
    """Solve P(X <= count) = level for the share, by halving: the probability falls with it."""
    if count >= trials:
        return 1.0
    numbers = torch.arange(count + 1).double()
    total = torch.tensor(trials).double()
    ways = torch.lgamma(total + 1) - torch.lgamma(numbers + 1) - torch.lgamma(total - numbers + 1)
    low, high = 0.0, 1.0
    for _ in range(45):
        middle = (low + high) / 2
        terms = ways + numbers * math.log(middle) + (trials - numbers) * math.log1p(-middle)
        if terms.exp().sum() > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
