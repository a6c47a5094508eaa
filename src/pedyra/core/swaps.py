"""Plans that know what a new triple would gain: Algorithm 2 along the gradient, and swaps that first do no harm.

A gain is sigma = u^T G v, the slope of the loss along a new triple of direction (u, v); G is the layer's gradient. To
second order the triple saves sigma^2 / (2 h) in all, with a curvature h that nobody knows. What is compared is
sigma^2, which takes h to be the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pedyra.core.allocation import RankPlan, Scores, layer_means, lowest, make_plan, prunable


@dataclass(frozen=True)
class Gain:
    """sigma along one direction: its mean over the steps that measured it, and the standard error of that mean."""

    mean: float
    error: float

    def at_least(self, certainty: float) -> float:
        """The mean less `certainty` standard errors; 0 where noise explains it."""
        return max(0.0, self.mean - certainty * self.error)

    def at_most(self, certainty: float) -> float:
        """The mean, where positive, and `certainty` standard errors."""
        return max(0.0, self.mean) + certainty * self.error


def choose_trials(
    scores: Scores, *, moves: int, min_rank: int, costs: Mapping[str, int], newborn: Mapping[str, Collection[int]]
) -> dict[str, tuple[int, ...]]:
    """Layer -> the triples to be tried: the `moves` lowest scores per unit of cost, but never a layer's `newborn`.

    More where these are so narrow that together they could not pay for one triple of the widest layer: no candidate
    there could then ever win. A triple that came with the last adjustment has had no time to learn; judging it would
    only undo that adjustment.
    """
    per_cost = {name: [value / costs[name] for value in values] for name, values in scores.items()}
    old = [triple for triple in prunable(per_cost, min_rank) if triple[2] not in newborn.get(triple[3], ())]
    count = paid = 0
    for _, _, _, name in sorted(old) if moves else ():
        if count >= moves and paid >= max(costs.values()):
            break
        count, paid = count + 1, paid + costs[name]
    return lowest(old, count)


def plan_swaps(
    scores: Scores,
    candidates: Mapping[str, Sequence[Gain]],
    trials: Mapping[str, Mapping[int, Gain]],
    *,
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    spare: int,
    certainty: float,
    margin: float,
) -> RankPlan:
    """First, do no harm: a candidate replaces triples on trial only where it clearly gains more than they do.

    A triple on trial is switched off while it is measured, so its gain is the slope at a contribution of zero, like a
    candidate's. The surest candidate per unit of cost is set against the triples on trial that are worth least, as many
    as pay for it. It wins where its sigma, less `certainty` errors, exceeds `margin` times theirs, plus one error
    each (several: the root of their squares' sum). One that the spare pays for only has to be more than noise.

    Args:
        candidates: per layer the gains of its new directions, surest first.
        trials: per layer, triple on trial -> its gain.
        spare: units of cost that nothing uses.
    """
    worth = {n: {i: gain.at_most(1.0) ** 2 for i, gain in tried.items()} for n, tried in trials.items()}
    sure = {n: [gain.at_least(certainty) ** 2 for gain in gains] for n, gains in candidates.items()}
    waiting = sorted(
        (value / costs[name], position, index, name)
        for position, name in enumerate(scores)
        for index, value in worth.get(name, {}).items()
    )
    return _grow(
        scores, sure, waiting, max_ranks=max_ranks, costs=costs, spare=spare, pays=lambda g, lost: g > margin**2 * lost
    )


def plan_along_gradient(
    scores: Scores,
    gains: Mapping[str, Sequence[float]],
    *,
    moves: int,
    min_rank: int,
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    spare: int,
) -> RankPlan:
    """Expansion by predicted gain: the best new directions of all layers replace the `moves` lowest triples.

    `gains` are, per layer, sigma of each candidate direction, best first, already corrected for noise; one of zero or
    less never moves anything. Candidates are taken by gain per unit of cost while what is pruned and spare pays for
    them, several in one layer if they deserve it. Nothing is pruned that buys nothing.
    """
    per_cost = {name: [value / costs[name] for value in values] for name, values in scores.items()}
    waiting = sorted(prunable(per_cost, min_rank))[:moves]
    return _grow(scores, gains, waiting, max_ranks=max_ranks, costs=costs, spare=spare, pays=lambda g, lost: True)


_Waiting = tuple[float, int, int, str]
"""Worth per unit of cost, position of the layer, triple, layer."""


def _grow(
    scores: Scores,
    gains: Mapping[str, Sequence[float]],
    waiting: list[_Waiting],
    *,
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    spare: int,
    pays: Callable[[float, float], bool],
) -> RankPlan:
    """Candidates, best gain per unit of cost first, take the place of what waits to go, worth least first.

    A candidate takes as many as pay for it together with what is spare, and only where `pays(its gain, their worth)`.
    """
    queue = sorted(
        (-gain / costs[name], position, index, name, gain)
        for position, name in enumerate(scores)
        for index, gain in enumerate(gains.get(name, ()))
        if gain > 0
    )
    gone: list[_Waiting] = []
    added: dict[str, int] = {}
    for _, _, _, name, gain in queue:
        if len(scores[name]) + added.get(name, 0) >= max_ranks[name]:
            continue
        needed, free = _payers(waiting, costs, spare, costs[name])
        lost = sum(worth * costs[layer] for worth, _, _, layer in waiting[:needed])
        if free < 0 or not pays(gain, lost):
            continue
        gone += waiting[:needed]
        waiting, spare = waiting[needed:], free
        added[name] = added.get(name, 0) + 1
    return make_plan(scores, lowest(gone, len(gone)), added, layer_means(scores, {}))


def _payers(waiting: Sequence[_Waiting], costs: Mapping[str, int], spare: int, price: int) -> tuple[int, int]:
    """How many of the first waiting triples must go to pay the price, and what is then free; negative: not enough."""
    needed, free = 0, spare - price
    while free < 0 and needed < len(waiting):
        free += costs[waiting[needed][3]]
        needed += 1
    return needed, free
