"""Algorithm 2: scores -> RankPlan, at a conserved budget of ranks or of parameters.

Plain Python on purpose: a plan is made once per adjustment from a few thousand numbers already on the host, and ties
must fall the same way on every machine: layer order, then triple index.
"""

from __future__ import annotations

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
    """Eq. (7), the scores that chose the layers to grow."""
    rescale: dict[str, float] = field(default_factory=dict)
    """Layer -> factor on its scaling alpha / r; only for methods whose r is the current rank."""


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
    pruned = _lowest(prunable(scores, min_rank), moves)
    ranking_scores = _layer_scores(scores, pruned if layer_score == "after" else {})
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    ranking = sorted(ranks, key=lambda name: -ranking_scores[name])  # stable: ties in layer order
    spare = sum(map(len, pruned.values()))
    added = round_robin(ranking, ranks, max_ranks, {name: 1 for name in ranks}, spare)
    return _plan(pruned, added, ranks, ranking_scores)


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
    pruned = _lowest(prunable(per_parameter, min_rank), moves)
    ranking_scores = _layer_scores(scores, pruned if layer_score == "after" else {})
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    ranking = sorted(ranks, key=lambda name: -ranking_scores[name] / costs[name])[: max(moves, 1)]
    freed = spare + sum(costs[name] * len(indices) for name, indices in pruned.items())
    added = round_robin(ranking, ranks, max_ranks, costs, freed) if moves else {}
    return _plan(pruned, added, ranks, ranking_scores)


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

    `gains` are, per layer, the loss each candidate direction would save per unit, best first, already corrected for
    noise; one of zero or less never moves anything. Candidates are taken by gain per unit of cost while what is
    pruned and spare pays for them, several in one layer if they deserve it. Nothing is pruned that buys nothing.
    """
    per_cost = {name: [value / costs[name] for value in values] for name, values in scores.items()}
    lowest = sorted(prunable(per_cost, min_rank))[:moves]
    candidates = [
        (-gain / costs[name], position, index, name)
        for position, name in enumerate(scores)
        for index, gain in enumerate(gains.get(name, ()))
        if gain > 0
    ]
    gone: list[tuple[float, int, int, str]] = []
    added: dict[str, int] = {}
    available = spare
    for _, _, _, name in sorted(candidates):
        if len(scores[name]) + added.get(name, 0) >= max_ranks[name]:
            continue
        needed = 0
        while available + sum(costs[n] for *_, n in lowest[len(gone) : len(gone) + needed]) < costs[name]:
            needed += 1
            if len(gone) + needed > len(lowest):
                break
        else:
            for triple in lowest[len(gone) : len(gone) + needed]:
                gone.append(triple)
                available += costs[triple[3]]
            available -= costs[name]
            added[name] = added.get(name, 0) + 1
    pruned = _lowest(gone, len(gone))
    ranks = {name: len(values) - len(pruned.get(name, ())) for name, values in scores.items()}
    return _plan(pruned, added, ranks, _layer_scores(scores, {}))


def prunable(scores: Scores, min_rank: int) -> list[tuple[float, int, int, str]]:
    """(score, layer position, triple index, layer) of every triple but each layer's best `min_rank`."""
    candidates = []
    for position, (name, values) in enumerate(scores.items()):
        by_score = sorted(range(len(values)), key=lambda i: (values[i], i))
        for index in by_score[: max(0, len(values) - min_rank)]:
            candidates.append((values[index], position, index, name))
    return candidates


def _lowest(candidates: list[tuple[float, int, int, str]], moves: int) -> dict[str, tuple[int, ...]]:
    pruned: dict[str, list[int]] = {}
    for _, _, index, name in sorted(candidates)[:moves]:
        pruned.setdefault(name, []).append(index)
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}


def _layer_scores(scores: Scores, pruned: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
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


def _plan(
    pruned: dict[str, tuple[int, ...]],
    added: dict[str, int],
    ranks: dict[str, int],
    layer_scores: dict[str, float],
) -> RankPlan:
    after = {name: rank + added.get(name, 0) for name, rank in ranks.items()}
    return RankPlan(pruned=pruned, added=added, ranks=after, layer_scores=layer_scores)
