"""Algorithm 2: scores -> RankPlan, at a conserved budget of ranks or of parameters.

Plain Python on purpose: a plan is made once per adjustment from a few thousand numbers already on the host, and ties
must fall the same way on every machine: layer order, then triple index.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Scores = Mapping[str, Sequence[float]]
"""Layer name -> the score of each of its triples, in the model's layer order."""


@dataclass(frozen=True)
class RankPlan:
    """One adjustment: which triples go, where new ones come, and the ranks that result."""

    pruned: dict[str, tuple[int, ...]]
    """Layer -> indices of its pruned triples, ascending. Only layers that lose any."""
    added: dict[str, int]
    """Layer -> number of new triples. Only layers that gain any."""
    ranks: dict[str, int]
    """Every layer's rank afterwards."""
    layer_scores: dict[str, float]
    """Eq. (7), a mean of each layer's scores."""
    rescale: dict[str, float] = field(default_factory=dict)
    """Layer -> factor on its scaling alpha / r; only for methods whose r is the current rank."""
    masked: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Layer -> indices of the triples whose E is set to 0 and that stay; only for a method that masks."""


def plan_adjustment(
    scores: Scores,
    *,
    moves: int,
    min_rank: int,
    max_ranks: Mapping[str, int],
    layer_score: str = "before",
) -> RankPlan:
    """Algorithm 2 with the sum of ranks conserved: prune the `moves` lowest triples, give one to each best layer.

    A layer's best `min_rank` triples are never pruned; when fewer than `moves` can go, fewer move. When `moves`
    exceeds the number of layers, the ranking is walked again (round-robin), so that the sum is conserved exactly.
    """
    pruned = lowest(prunable(scores, min_rank), moves)
    ranking_scores = layer_means(scores, pruned if layer_score == "after" else {})
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    ranking = sorted(ranks, key=lambda name: -ranking_scores[name])  # stable: ties in layer order
    spare = sum(map(len, pruned.values()))
    added = round_robin(ranking, ranks, max_ranks, {name: 1 for name in ranks}, spare)
    return make_plan(scores, pruned, added, ranking_scores)


def plan_parameters(
    scores: Scores,
    *,
    moves: int,
    min_rank: int,
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    spare: int,
    layer_score: str = "before",
) -> RankPlan:
    """Algorithm 2 with the parameters conserved: a move is ranked by its score per parameter.

    `costs` are the parameters of one triple of a layer, `spare` those left unused by earlier adjustments. The
    `moves` triples with the lowest score per parameter go; what they free, with the spare, buys triples for the
    `moves` best layers in turn, as long as one fits. What is left over is carried to the next adjustment.
    """
    per_parameter = {name: [value / costs[name] for value in values] for name, values in scores.items()}
    pruned = lowest(prunable(per_parameter, min_rank), moves)
    ranking_scores = layer_means(scores, pruned if layer_score == "after" else {})
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    ranking = sorted(ranks, key=lambda name: -ranking_scores[name] / costs[name])[: max(moves, 1)]
    freed = spare + sum(costs[name] * len(indices) for name, indices in pruned.items())
    added = round_robin(ranking, ranks, max_ranks, costs, freed) if moves else {}
    return make_plan(scores, pruned, added, ranking_scores)


def deal_ranks(
    losses: Scores, *, min_rank: int, max_ranks: Mapping[str, int], costs: Mapping[str, int], spare: int
) -> RankPlan:
    """All ranks dealt anew, in proportion to what a layer's triples save of the loss per unit of cost.

    If r triples of a layer save a log r, the next one saves a / r, and a budget buys most where a / (r cost) is the
    same in every layer. a is taken to be what removing the layer's triples one by one would cost. Ranks become whole
    numbers by Webster's method: one after the other to the layer where a / ((r + 1/2) cost) is largest, of those that
    can be paid for. A layer that shrinks loses its lowest. Nothing changes where no triple saves anything, or what one
    saves is not finite.

    Args:
        losses: what removing each triple costs.
        costs: units of one triple of each layer.
        spare: units that nothing uses.
    """
    totals = {name: sum(values) for name, values in losses.items()}
    if not any(totals.values()) or not all(map(math.isfinite, totals.values())):
        return make_plan(losses, {}, {}, layer_means(losses, {}))
    left = spare + sum(costs[name] * len(values) for name, values in losses.items())
    ranks = {name: min(min_rank, len(values)) for name, values in losses.items()}
    left -= sum(costs[name] * rank for name, rank in ranks.items())

    def claim(position: int, name: str) -> tuple[float, int, str]:
        return -totals[name] / ((ranks[name] + 0.5) * costs[name]), position, name

    queue = [claim(position, name) for position, name in enumerate(ranks)]
    heapq.heapify(queue)
    while queue:
        _, position, name = heapq.heappop(queue)
        if ranks[name] < max_ranks[name] and costs[name] <= left:  # else never again: less and less is left
            ranks[name] += 1
            left -= costs[name]
            heapq.heappush(queue, claim(position, name))
    pruned, added = {}, {}
    for name, values in losses.items():
        if ranks[name] < len(values):
            order = sorted(range(len(values)), key=lambda i: (values[i], i))
            pruned[name] = tuple(sorted(order[: len(values) - ranks[name]]))
        elif ranks[name] > len(values):
            added[name] = ranks[name] - len(values)
    return make_plan(losses, pruned, added, layer_means(losses, {}))


def largest_growth(losses: Scores, costs: Mapping[str, int]) -> float:
    """How many times its rank the layer that gains most would get in a deal, before rounding; 0 where nothing is known.

    A layer without triples gets none and does not count.
    """
    present = {name: values for name, values in losses.items() if len(values)}
    total = sum(sum(values) for values in present.values())
    if not total > 0 or not math.isfinite(total):
        return 0.0
    budget = sum(costs[name] * len(values) for name, values in present.items())
    # r_l proportional to loss / cost, and the sum of r_l cost is the budget.
    return max(budget * sum(values) / (total * costs[name] * len(values)) for name, values in present.items())


def prunable(scores: Scores, min_rank: int) -> list[tuple[float, int, int, str]]:
    """(score, layer position, triple index, layer) of every triple but each layer's best `min_rank`."""
    candidates = []
    for position, (name, values) in enumerate(scores.items()):
        by_score = sorted(range(len(values)), key=lambda i: (values[i], i))
        for index in by_score[: max(0, len(values) - min_rank)]:
            candidates.append((values[index], position, index, name))
    return candidates


def lowest(candidates: list[tuple[float, int, int, str]], moves: int) -> dict[str, tuple[int, ...]]:
    """Layer -> ascending indices of the `moves` lowest of these candidates (see `prunable`)."""
    pruned: dict[str, list[int]] = {}
    for _, _, index, name in sorted(candidates)[:moves]:
        pruned.setdefault(name, []).append(index)
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}


def layer_means(scores: Scores, pruned: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Eq. (7): the mean over a layer's triples, without those in `pruned`; 0 for a layer without any."""
    result = {}
    for name, values in scores.items():
        kept = [value for index, value in enumerate(values) if index not in pruned.get(name, ())]
        result[name] = sum(kept) / len(kept) if kept else 0.0
    return result


def round_robin(
    ranking: Sequence[str],
    ranks: Mapping[str, int],
    max_ranks: Mapping[str, int],
    costs: Mapping[str, int],
    available: int,
) -> dict[str, int]:
    """One triple to each layer down the ranking, again and again, while one is affordable and below its cap."""
    added: dict[str, int] = {}
    placed = True
    while placed:
        placed = False
        for name in ranking:
            if costs[name] <= available and ranks[name] + added.get(name, 0) < max_ranks[name]:
                added[name] = added.get(name, 0) + 1
                available -= costs[name]
                placed = True
    return added


def make_plan(
    scores: Scores,
    pruned: dict[str, tuple[int, ...]],
    added: dict[str, int],
    layer_scores: dict[str, float],
) -> RankPlan:
    """The RankPlan of these removals and additions."""
    ranks = {name: len(values) - len(pruned.get(name, ())) + added.get(name, 0) for name, values in scores.items()}
    return RankPlan(pruned=pruned, added=added, ranks=ranks, layer_scores=layer_scores)
