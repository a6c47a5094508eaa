"""PE-DyRA: the scores of Algorithm 1 and the plan of Algorithm 2, at the budget in force."""

from __future__ import annotations

from dataclasses import dataclass

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.equations import plan_adjustment
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation


@dataclass(frozen=True, kw_only=True)
class PeDyra(RankSettings):
    """The paper's method, and its settings: `adapt(trainer, PeDyra())` moves ranks between the layers of a LoRA while
    it trains. Every field, with the paper's symbol, is one of `RankSettings`."""

    def method(self) -> ScoredMethod:
        """The method with these settings."""
        return ScoredMethod(**self.to_dict(), policy=Algorithm2(self.layer_score), conserves=True)


@dataclass(frozen=True)
class Algorithm2:
    """The paper's policy."""

    layer_score: str = "before"
    """Eq. (7) on the triples "before" or "after" the pruning of the same adjustment."""

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        of_parameters = now.budget == "parameters"
        return plan_adjustment(
            scores,
            moves=now.moves,
            min_rank=now.min_rank,
            max_ranks=now.max_ranks,
            layer_score=self.layer_score,
            parameters=now.parameters if of_parameters else None,
            spare=now.spare if of_parameters else 0,
        )
