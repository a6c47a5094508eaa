"""A search for the best fixed ranks: what one rank more or less is worth in each group of layers, then exchanges.

A group is a type of layer (q, up, ...), and a pattern gives it one rank. Each round tries one rank more and one rank
less in every group, beyond or below the budget, and so learns a marginal value of each; the exchanges that these values
predict to be best at the budget are tried, and the best becomes the next pattern, if it is better at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Pattern = dict[str, int]
"""Group -> rank."""

# The second rank at once brings less than the first, and costs more where it goes. A guess that only orders what is
# tried.
_SECOND_GAIN, _SECOND_LOSS = 0.6, 1.6
_MOST_PATTERNS = 500_000
"""More exchanges than this are not enumerated."""


@dataclass(frozen=True)
class Round:
    """What one round found."""

    pattern: Pattern
    """The best pattern at the budget so far."""
    loss: float
    gains: dict[str, float]
    """Group -> loss saved by one more rank, in the pattern that the round started from."""
    losses: dict[str, float]
    """Group -> loss added by one rank less; only where there is one."""
    improved: bool
    """False: nothing that was tried is better, and the search ends."""


def search_pattern(
    start: Pattern,
    costs: Mapping[str, int],
    evaluate: Callable[[Pattern], float],
    *,
    rounds: int,
    tries: int = 3,
) -> Iterator[Round]:
    """Rounds of the search from `start`, whose cost is the budget.

    Args:
        costs: group -> parameters of one rank in all of its layers.
        evaluate: pattern -> loss, lower is better; the same for the same pattern.
        tries: exchanges to evaluate in a round.
    """
    budget = sum(costs[group] * rank for group, rank in start.items())
    current, loss = dict(start), evaluate(start)
    for _ in range(rounds):
        gains = {group: loss - evaluate(changed(current, {group: 1})) for group in current}
        losses = {group: evaluate(changed(current, {group: -1})) - loss for group in current if current[group]}
        spare = budget - sum(costs[group] * rank for group, rank in current.items())
        tried = [changed(current, change) for change in exchanges(current, costs, gains, losses, spare)[:tries]]
        results = [(evaluate(pattern), index) for index, pattern in enumerate(tried)]
        best, index = min(results, default=(loss, -1))
        improved = best < loss
        if improved:
            current, loss = tried[index], best
        yield Round(dict(current), loss, gains, losses, improved)
        if not improved:
            return


def changed(pattern: Mapping[str, int], change: Mapping[str, int]) -> Pattern:
    """The pattern with these differences of ranks."""
    return {group: rank + change.get(group, 0) for group, rank in pattern.items()}


def exchanges(
    pattern: Mapping[str, int],
    costs: Mapping[str, int],
    gains: Mapping[str, float],
    losses: Mapping[str, float],
    spare: int,
) -> list[dict[str, int]]:
    """Group -> change of rank, for every exchange within `spare` that should gain, the best first.

    At most two ranks a group, one where there are too many groups to try all.
    """
    reach = 2 if 5 ** len(pattern) <= _MOST_PATTERNS else 1
    groups = list(pattern)
    options = [[step for step in range(-reach, reach + 1) if pattern[group] + step >= 0] for group in groups]
    worth = [
        {step: _worth(step, gains[group], losses.get(group, 0.0)) for step in steps}
        for group, steps in zip(groups, options, strict=True)
    ]
    found = []
    for steps in itertools.product(*options):
        cost = sum(costs[group] * step for group, step in zip(groups, steps, strict=True))
        if cost > spare:
            continue
        gain = sum(values[step] for values, step in zip(worth, steps, strict=True))
        if gain > 0:
            found.append((-gain, steps))
    return [{g: s for g, s in zip(groups, steps, strict=True) if s} for _, steps in sorted(found)]


def _worth(step: int, gain: float, loss: float) -> float:
    second = abs(step) == 2
    if step > 0:
        return gain * (1 + _SECOND_GAIN * second)
    return -loss * (1 + _SECOND_LOSS * second) if step else 0.0
