"""What an allocator tells a policy: its `Situation` at an adjustment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedyra.allocate.allocation import Scores
from pedyra.allocate.rule import Situation
from pedyra.allocate.schedule import margin_at, moves_at
from pedyra.methods.pedyra.sketching import Sketching
from pedyra.methods.pedyra.trials import known_curvature, predicted_losses

if TYPE_CHECKING:
    from pedyra.allocate.rank_allocator import RankAllocator


def situation(allocator: RankAllocator, sketching: Sketching, max_ranks: dict[str, int], lengths: Scores) -> Situation:
    """What a policy may know now.

    Args:
        sketching: what the sketch of these steps has measured.
        max_ranks: the most that each layer may have.
        lengths: those of the triples, where they are tried.
    """
    config, progress = allocator.config, allocator.schedule.progress(allocator.step)
    settings = allocator.settings
    trials = sketching.trials()
    curvature = known_curvature(allocator.layers, allocator.history, trials)
    costs = {layer.name: layer.cost for layer in allocator.layers}
    spare = allocator.initial_parameters - allocator.parameters
    payable = trials is not None and (any(trials.values()) or spare >= min(costs.values()))
    return Situation(
        step=allocator.step,
        schedule=allocator.schedule,
        history=allocator.history,
        ranks=allocator.ranks,
        progress=progress,
        moves=moves_due(allocator, allocator.step),
        min_rank=config.min_rank,
        max_ranks=max_ranks,
        costs=costs,
        spare=spare,
        budget=config.budget,
        layer_score=config.importance.layer_score if config.importance else "before",
        candidates=sketching.candidates(),
        chance=sketching.chance(),
        trials=trials,
        curvature=curvature,
        losses=predicted_losses(lengths, curvature) if payable else {},
        certainty=settings.certainty if settings else 0.0,
        margin=margin_at(settings.margin, progress) if settings else 1.0,
    )


def moves_due(allocator: RankAllocator, step: int) -> int:
    """k at the adjustment after this step."""
    if not allocator.moves:
        return 0
    swapped = bool(allocator.history) and not allocator.history[-1]["dealt"]
    last = sum(allocator.history[-1]["added"].values()) if swapped else 0
    return allocator.moves if allocator.settings is None else moves_at(allocator.moves, last)
