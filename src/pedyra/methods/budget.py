"""Arithmetic of budgets: what a triple costs, the lowest triples that free an amount, how much of a run is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pedyra.allocate.allocation import Scores, prunable

if TYPE_CHECKING:
    from pedyra.pe_dyra.scored import ScoredSituation


def units(now: ScoredSituation) -> dict[str, int]:
    """What a triple of each layer costs: 1 where the budget counts ranks, its parameters where it counts those."""
    return dict.fromkeys(now.parameters, 1) if now.budget == "ranks" else now.parameters


def spent(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """The budget that these ranks take up."""
    return sum(rank * costs[name] for name, rank in ranks.items())


def uniform(rank: int, costs: Mapping[str, int]) -> int:
    """The budget of the same rank in every layer: LoRA's."""
    return rank * sum(costs.values())


def elapsed(now: ScoredSituation) -> float:
    """(t - t_i) / (T - t_f - t_i): the part of the window of adjustments that is over."""
    schedule = now.schedule
    return (now.step - schedule.initial_warmup) / (
        schedule.total_steps - schedule.final_warmup - schedule.initial_warmup
    )


def is_last(now: ScoredSituation) -> bool:
    """Whether this is the last adjustment of the run."""
    return now.step == now.schedule.adjustments[-1]


def part_done(now: ScoredSituation) -> float:
    """n / N at the n-th of N adjustments: the even spread over the run, 1 at the last."""
    adjustments = now.schedule.adjustments
    return (adjustments.index(now.step) + 1) / len(adjustments)


def lowest_worth(scores: Scores, costs: Mapping[str, int], excess: int, min_rank: int) -> dict[str, tuple[int, ...]]:
    """The triples with the lowest score per unit that free at least `excess` units; fewer where min_rank forbids."""
    per_unit = {name: [value / costs[name] for value in values] for name, values in scores.items()}
    pruned: dict[str, list[int]] = {}
    for _, _, index, name in sorted(prunable(per_unit, min_rank)):
        if excess <= 0:
            break
        pruned.setdefault(name, []).append(index)
        excess -= costs[name]
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}
