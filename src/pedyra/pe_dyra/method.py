"""PE-DyRA, the method: settings, scores and a plan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.contract import Training, Work
from pedyra.allocate.scored import ScoredMethod, ScoredSituation
from pedyra.lora.layer import adapted_layers
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.equations import plan_adjustment
from pedyra.pe_dyra.triple_scores import TripleScores


@dataclass(frozen=True, kw_only=True)
class PaperMethod(RankSettings, ScoredMethod):
    """PE-DyRA and its ablations have the same scores, start and settings, and each a plan of its own."""

    scores = TripleScores


@dataclass(frozen=True, kw_only=True)
class PeDyra(PaperMethod):
    """PE-DyRA (the paper): the weakest triples of all layers go, and the layers with the strongest get as many.

    `pedyra.adapt(trainer, PeDyra())` has the ranks of a LoRA move while it trains, at LoRA's own rate and alpha;
    `PeDyra.as_published()` is the paper to the letter.
    """

    conserves = True

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        """Put triples into the adapter; from LoRA's start, at whose rate it trains, layers that grow step no faster."""
        work = super().install(model, adapter, training)
        for layer in adapted_layers(model, adapter) if self.start == "lora" else ():
            layer.a.doubling = layer.a.doubling or (layer.rank, layer.scaling)
        return work

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        """Follow Algorithm 2, at the budget in force."""
        of_parameters = now.budget == "parameters"
        return plan_adjustment(
            scores,
            moves=now.moves,
            min_rank=now.min_rank,
            max_ranks=now.max_ranks,
            parameters=now.parameters if of_parameters else None,
            spare=now.spare if of_parameters else 0,
        )
