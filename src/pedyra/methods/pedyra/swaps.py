"""Plans that know what a new triple would gain: swaps that first do no harm.

A gain is sigma = u^T G v, the slope of the loss along a triple of direction (u, v) at a contribution of zero; G is the
layer's gradient. To second order a new triple saves sigma^2 / (2 h) in all. The curvature h is measured where triples
are on trial: one of length c, switched off, has grown until the slope was gone, so h = sigma / c, and it is worth
sigma c / 2. It is taken to be the inputs' mean square along v, the *energy*, times a factor of the layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest, make_plan, prunable


class Gain(NamedTuple):
    """sigma along one direction: its mean over the steps that measured it, and the standard error of that mean."""

    mean: float
    error: float
    energy: float = 1.0
    """Mean square of the layer's inputs along v."""
    length: float = 0.0
    """Of a triple on trial, ||s b e a|| with the scaling s of its layer; 0 for a new direction."""

    def beyond(self, errors: float) -> bool:
        """Whether the mean is more than so many of its own errors."""
        return self.mean > errors * self.error

    def surety(self, certainty: float) -> float:
        """sigma^2 less the square of `certainty` errors, by the energy: what orders a layer's directions."""
        return (self.mean * abs(self.mean) - (certainty * self.error) ** 2) / max(self.energy, TINY)

    def saves(self, curvature: float, certainty: float) -> float:
        """What a new triple along this direction surely saves of the loss; 0 where noise explains sigma.

        `curvature` is that by energy.
        """
        return max(0.0, self.surety(certainty)) / (2 * max(curvature, TINY))

    @property
    def worth(self) -> float:
        """The loss that a triple on trial saves, at most: one error more than the mean, where that is positive."""
        return (max(0.0, self.mean) + self.error) * self.length / 2


class Contest(NamedTuple):
    """What became of one candidate."""

    layer: str
    candidate: int
    """Its place among the layer's candidates, the surest being 0."""
    gain: float
    """What it surely saves of the loss."""
    cost: int
    """Units of the budget that it takes."""
    against: tuple[tuple[str, int, float], ...]
    """(layer, triple, worth) of what would pay for it, worth least first."""
    bar: float
    """What the gain must exceed."""
    outcome: str
    """"won", or why not: "noise" (chance explains it), "too small" (to matter), "worth less" (than what it would
    replace), "cannot be paid for", "no room" (the layer is at its highest rank)."""


WORTH_MOVING = 0.001
"""Part of what an average triple saves that a new one must save: less is lost in what a move disturbs."""

TINY = 1e-30
"""Below every curvature and energy that means anything: no division by zero."""


def surest_first(gains: Sequence[Gain], certainty: float, least: float) -> list[int]:
    """A layer's candidates in the order in which a plan takes them: those beyond `least` errors, then by surety."""
    return sorted(range(len(gains)), key=lambda i: (not gains[i].beyond(least), -gains[i].surety(certainty)))


Trials = Mapping[str, Mapping[int, Gain]]
"""Layer -> triple on trial -> its gain."""


@dataclass(frozen=True)
class Curvature:
    """A layer's curvature by length, h, and by length and energy, h / energy."""

    by_length: float
    by_energy: float

    def losses(self, lengths: Sequence[float]) -> list[float]:
        """h c^2 / 2: what pruning triples of these lengths costs."""
        return [self.by_length * length**2 / 2 for length in lengths]


def curvatures(names: Sequence[str], looks: Sequence[Trials]) -> dict[str, Curvature]:
    """The curvature of every layer, from the triples on trial at every adjustment so far, oldest first.

    Least squares of sigma = h c over a layer's trials, sigma being one error more than its mean, where one counts half
    as much at each later adjustment. All layers together count as one more trial of each: a layer without trials of its
    own has the curvature of all. It is 1 before the first trial.
    """
    slope = dict.fromkeys(names, 0.0)
    length, energy, count = dict(slope), dict(slope), 0.0
    for age, look in enumerate(reversed(looks)):
        for name, tried in look.items():
            for gain in tried.values():
                weight = 0.5**age
                slope[name] += weight * 2 * gain.worth
                length[name] += weight * gain.length**2
                energy[name] += weight * gain.length**2 * gain.energy
                count += weight

    mean_slope, mean_length, mean_energy = (sum(each.values()) / max(count, TINY) for each in (slope, length, energy))

    def of_layer(name: str, sizes: Mapping[str, float], mean: float) -> float:
        return 1.0 if mean <= TINY else (slope[name] + mean_slope) / (sizes[name] + mean)

    return {name: Curvature(of_layer(name, length, mean_length), of_layer(name, energy, mean_energy)) for name in names}


def least_gain(losses: Scores, costs: Mapping[str, int]) -> float:
    """What a new triple must save per unit of cost to be worth a move, by what pruning each triple there is costs."""
    paid = sum(costs[name] * len(values) for name, values in losses.items())
    return WORTH_MOVING * sum(sum(values) for values in losses.values()) / max(1, paid)


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
    trials: Trials,
    curvature: Mapping[str, Curvature],
    *,
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    spare: int,
    certainty: float,
    chance: float,
    least: float,
    margin: float,
) -> tuple[RankPlan, list[Contest]]:
    """First, do no harm: a candidate replaces triples on trial only where it clearly saves more than they do.

    The candidate that surely saves most per unit of cost is set against the triples on trial that are worth least, as
    many as pay for it. It wins where what it surely saves exceeds the square of `margin` times what they are worth. One
    that the spare pays for only has to be more than noise. What chance explains among so many candidates, or saves too
    little to matter, never wins.

    Returns the plan, and what became of every layer's candidates that are more than noise, and of its surest one.

    Args:
        candidates: per layer the gains of its new directions, surest first.
        curvature: per layer, see `curvatures`.
        chance: the bound of `core.noise.chance`, in standard errors; a gain at or below it is treated as noise.
        least: what a candidate must save per unit of cost, see `least_gain`.
        spare: units of cost that nothing uses.
    """
    sure: dict[str, list[float]] = {}
    contests: list[Contest] = []
    for name, gains in candidates.items():
        saved = [gain.saves(curvature[name].by_energy, certainty) for gain in gains]
        sure[name] = []
        for index, (gain, value) in enumerate(zip(gains, saved, strict=True)):
            outcome = "noise" if not gain.beyond(chance) else "too small" if value <= least * costs[name] else None
            sure[name].append(0.0 if outcome else value)
            if outcome and index == 0:
                contests.append(Contest(name, index, value, costs[name], (), least * costs[name], outcome))
    waiting = sorted(
        (gain.worth / costs[name], position, index, name)
        for position, name in enumerate(scores)
        for index, gain in trials.get(name, {}).items()
    )
    plan, fought = _grow(scores, sure, waiting, max_ranks=max_ranks, costs=costs, spare=spare, margin=margin)
    return plan, contests + fought


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
    margin: float,
) -> tuple[RankPlan, list[Contest]]:
    """Candidates, best gain per unit of cost first, take the place of what waits to go, worth least first.

    A candidate takes as many as pay for it together with what is spare.
    """
    queue = sorted(
        (-gain / costs[name], position, index, name, gain)
        for position, name in enumerate(scores)
        for index, gain in enumerate(gains.get(name, ()))
        if gain > 0
    )
    gone: list[_Waiting] = []
    added: dict[str, int] = {}
    contests: list[Contest] = []
    ranks = {name: len(values) for name, values in scores.items()}
    for _, _, index, name, gain in queue:
        needed, free = _payers(waiting, costs, spare, costs[name])
        payers = waiting[:needed]
        lost = sum(worth * costs[layer] for worth, _, _, layer in payers)
        rank = ranks[name] - sum(layer == name for *_, layer in payers) + 1  # what goes makes room in its own layer
        if free < 0:
            outcome = "cannot be paid for"
        elif not gain > margin**2 * lost:
            outcome = "worth less"
        else:
            outcome = "no room" if rank > max_ranks[name] else "won"
        against = tuple((layer, triple, worth * costs[layer]) for worth, _, triple, layer in payers)
        contests.append(Contest(name, index, gain, costs[name], against, margin**2 * lost, outcome))
        if outcome != "won":
            continue
        for *_, layer in payers:
            ranks[layer] -= 1
        ranks[name] += 1
        gone += payers
        waiting, spare = waiting[needed:], free
        added[name] = added.get(name, 0) + 1
    return make_plan(scores, lowest(gone, len(gone)), added, layer_means(scores, {})), contests


def _payers(waiting: Sequence[_Waiting], costs: Mapping[str, int], spare: int, price: int) -> tuple[int, int]:
    """How many of the first waiting triples must go to pay the price, and what is then free; negative: not enough."""
    needed, free = 0, spare - price
    while free < 0 and needed < len(waiting):
        free += costs[waiting[needed][3]]
        needed += 1
    return needed, free
