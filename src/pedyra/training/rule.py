"""What a rank-adaptive method is made of: where its scores come from, what it decides, and how a new triple begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pedyra.adapters.attach import AdaptedLayer
from pedyra.adapters.resize import NewTriples
from pedyra.config import RankConfig
from pedyra.core.allocation import RankPlan, Scores, plan_adjustment, plan_along_gradient, plan_parameters
from pedyra.core.schedule import Schedule
from pedyra.training.scores import ScoreState


@dataclass(frozen=True)
class Situation:
    """What a policy may know besides the scores when it plans an adjustment."""

    step: int
    schedule: Schedule
    history: Sequence[dict[str, Any]]
    """The records of the adjustments so far, oldest first."""
    ranks: dict[str, int]
    """Layer -> rank before this adjustment, in the model's order."""
    progress: float
    """0 at the first adjustment, approaching 1 at the end of the window."""
    moves: int
    """k at this step."""
    min_rank: int
    max_ranks: dict[str, int]
    costs: dict[str, int]
    """Parameters of one triple of each layer."""
    spare: int
    """Parameters below the initial count."""
    budget: str
    layer_score: str
    gains: dict[str, list[float]] | None
    """Noise-corrected gains of the candidate directions per layer, best first; None without a sketch."""


Policy = Callable[[Scores, Situation], RankPlan]
"""Scores -> plan. Must be a pure function: resume replays nothing but continues from the same state."""

ScoreSource = Callable[[nn.Module, Sequence[AdaptedLayer], RankConfig], ScoreState]
"""Makes what observes the layers of a model."""


def unchecked(start: Situation) -> None:
    """The check of a method that can do its work from any start."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rank-adaptive method. What is None is PE-DyRA's."""

    policy: Policy
    scores: ScoreSource | None = None
    new_triples: Callable[[AdaptedLayer, int, torch.Generator], NewTriples] | None = None
    """(layer, how many, generator) -> the triples to append, for a method that fixes how they begin."""
    check: Callable[[Situation], None] | None = None
    """Called with the situation before the first step; raises ValueError where the method cannot do its work."""


def bidirectional(scores: Scores, now: Situation) -> RankPlan:
    """Algorithm 2 at the budget in force: the policy of PE-DyRA."""
    if now.gains is not None:
        unit = now.budget == "ranks"
        return plan_along_gradient(
            scores,
            now.gains,
            moves=now.moves,
            min_rank=now.min_rank,
            max_ranks=now.max_ranks,
            costs=dict.fromkeys(now.costs, 1) if unit else now.costs,
            spare=0 if unit else now.spare,
        )
    if now.budget == "ranks":
        return plan_adjustment(
            scores, moves=now.moves, min_rank=now.min_rank, max_ranks=now.max_ranks, layer_score=now.layer_score
        )
    return plan_parameters(
        scores,
        moves=now.moves,
        min_rank=now.min_rank,
        max_ranks=now.max_ranks,
        costs=now.costs,
        spare=now.spare,
        layer_score=now.layer_score,
    )
