"""What a rank-adaptive method is made of: where its scores come from, what it decides, and how a new triple begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pedyra.allocate.allocation import RankPlan, Scores, plan_adjustment, plan_parameters
from pedyra.allocate.schedule import Schedule
from pedyra.allocate.scores import ScoreState
from pedyra.config import RankConfig
from pedyra.lora.attach import AdaptedLayer
from pedyra.lora.resize import NewTriples
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.swaps import Curvature, Gain, least_gain, plan_swaps


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
    candidates: dict[str, list[Gain]] | None
    """Gains of the candidate directions per layer, surest first; None of a method that scores triples."""
    chance: float
    """Errors of its own that the gain of one of them reaches by chance alone; see `core.noise.chance`, which is less
    exact where nothing is beyond it."""
    trials: dict[str, dict[int, Gain]] | None
    """Gains of the triples on trial per layer; None of a method that scores triples."""
    curvature: dict[str, Curvature]
    """Per layer, by the trials of this adjustment and all before it."""
    losses: dict[str, list[float]]
    """By that curvature, what pruning each triple costs; empty where nothing could pay for a new one."""
    certainty: float
    margin: float
    """At this step."""

    @property
    def prices(self) -> dict[str, int]:
        """What one triple of each layer takes of the budget."""
        return dict.fromkeys(self.costs, 1) if self.budget == "ranks" else self.costs


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
    trains_e: bool | None = None
    """Whether E is trained. None: where it starts at 0 (`RankConfig.start` "svd"), or nothing would be learned."""
    new_moments: str = "zero"
    """Adam's second moments of new rows: see `optimizer_state.move_state`."""
    settings: Settings | None = None
    """Of our default method, which measures; None: a method that scores triples."""
    goes_by_history: bool = False
    """Whether what it does next, or its scaling, follows from what it did: without the record no run goes on."""


def default_rule(config: RankConfig) -> Rule:
    """The rule of a config: the paper's by its `importance`, our default without."""
    return Rule(policy=bidirectional, settings=Settings() if config.importance is None else None)


def e_is_trained(rule: Rule, config: RankConfig) -> bool:
    """Whether E is a parameter in a run of this rule."""
    return config.start == "svd" if rule.trains_e is None else rule.trains_e


def bidirectional(scores: Scores, now: Situation) -> RankPlan:
    """Algorithm 2 at the budget in force, or what goes beyond it: the policy of PE-DyRA."""
    unit = now.budget == "ranks"
    costs, spare = now.prices, 0 if unit else now.spare
    limits: Any = dict(moves=now.moves, min_rank=now.min_rank, max_ranks=now.max_ranks)
    if now.candidates is not None and now.trials is not None:
        return plan_swaps(
            scores,
            now.candidates,
            now.trials,
            now.curvature,
            max_ranks=now.max_ranks,
            costs=costs,
            spare=spare,
            certainty=now.certainty,
            chance=now.chance,
            least=least_gain(now.losses, costs),
            margin=now.margin,
        )
    if unit:
        return plan_adjustment(scores, **limits, layer_score=now.layer_score)
    return plan_parameters(scores, **limits, costs=costs, spare=spare, layer_score=now.layer_score)
