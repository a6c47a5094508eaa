"""What a rank-adaptive method is made of: where its scores come from, what it decides, and how a new triple begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pedyra.adapters.attach import AdaptedLayer
from pedyra.adapters.resize import NewTriples
from pedyra.config import RankConfig
from pedyra.core.allocation import RankPlan, Scores
from pedyra.training.scores import ScoreState

if TYPE_CHECKING:
    from pedyra.training.rank_allocator import Situation

Policy = Callable[[Scores, "Situation"], RankPlan]
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
