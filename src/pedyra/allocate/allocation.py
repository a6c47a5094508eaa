"""An adjustment is a RankPlan; here is what plans are made of, and how much of it stays.

In plain Python: its few thousand numbers are on the host, and ties must fall the same way on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Literal

Budget = Literal["ranks", "parameters"]
"""What a method conserves or aims at: the sum of the ranks, or the number of parameters."""
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


def prunable(scores: Scores, min_rank: int) -> list[tuple[float, int, int, str]]:
    """List (score, layer position, triple index, layer) of every triple but each layer's best `min_rank`."""
    candidates = []
    for position, (name, values) in enumerate(scores.items()):
        by_score = sorted(range(len(values)), key=lambda i: (values[i], i))
        for index in by_score[: max(0, len(values) - min_rank)]:
            candidates.append((values[index], position, index, name))
    return candidates


def lowest(candidates: list[tuple[float, int, int, str]], moves: int) -> dict[str, tuple[int, ...]]:
    """Return layer -> ascending indices of the `moves` lowest of these candidates (see `prunable`)."""
    pruned: dict[str, list[int]] = {}
    for _, _, index, name in sorted(candidates)[:moves]:
        pruned.setdefault(name, []).append(index)
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}


def lowest_to_free(scores: Scores, units: Mapping[str, int], excess: int, min_rank: int) -> dict[str, tuple[int, ...]]:
    """Find the triples with the lowest scores that free at least `excess` units; fewer where min_rank forbids."""
    candidates = sorted(prunable(scores, min_rank))
    free = accumulate((units[name] for *_, name in candidates), initial=0)
    return lowest(candidates, sum(units_before < excess for units_before in islice(free, len(candidates))))


def cost(ranks: Mapping[str, int], units: Mapping[str, int]) -> int:
    """Return the budget that these ranks take up."""
    return sum(rank * units[name] for name, rank in ranks.items())


def layer_means(scores: Scores) -> dict[str, float]:
    """Compute Eq. (7): the mean over a layer's triples; 0 for a layer without any."""
    return {name: sum(values) / len(values) if values else 0.0 for name, values in scores.items()}


def round_robin(
    ranking: Sequence[str],
    ranks: Mapping[str, int],
    max_ranks: Mapping[str, int],
    units: Mapping[str, int],
    available: int,
) -> dict[str, int]:
    """Give one triple to each layer down the ranking, again and again, while one is affordable and below its cap."""
    added: dict[str, int] = {}
    placed = True
    while placed:
        placed = False
        for name in ranking:
            if units[name] <= available and ranks[name] + added.get(name, 0) < max_ranks[name]:
                added[name] = added.get(name, 0) + 1
                available -= units[name]
                placed = True
    return added


def make_plan(
    scores: Scores,
    pruned: Mapping[str, tuple[int, ...]],
    added: Mapping[str, int],
    layer_scores: Mapping[str, float],
    rescale: Mapping[str, float] | None = None,
) -> RankPlan:
    """Make the RankPlan of these removals and additions; a layer that gains no triple is left out of `added`."""
    ranks = {name: len(values) - len(pruned.get(name, ())) + added.get(name, 0) for name, values in scores.items()}
    gains = {name: count for name, count in added.items() if count}
    return RankPlan(dict(pruned), gains, ranks, dict(layer_scores), dict(rescale or {}))


def stayed(history: Sequence[Mapping[str, Any]]) -> int:
    """Count the triples that an adjustment added and that no later one has pruned, from the records of a run."""
    is_new: dict[str, list[bool]] = {}  # layer -> for each of its triples
    for record in history:
        pruned = {(name, index) for name, index, _ in record["pruned"]}
        for name, rank in record["ranks"].items():
            added = record["added"].get(name, 0)
            before = rank - added + sum(layer == name for layer, _ in pruned)
            earlier = is_new[name] if name in is_new else [False] * before
            survivors = [new for index, new in enumerate(earlier) if (name, index) not in pruned]
            is_new[name] = survivors + [True] * added
    return sum(sum(each) for each in is_new.values())
