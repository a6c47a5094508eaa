"""The paper's ablations share PE-DyRA's scores, and prune only, expand only, move at random, or mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from pedyra.allocate.allocation import RankPlan, Scores, cost, layer_means, lowest, make_plan, prunable, round_robin
from pedyra.allocate.contract import Beginning
from pedyra.allocate.scored import ScoredSituation
from pedyra.errors import UserError
from pedyra.methods.sizes import Growing, Shrinking
from pedyra.pe_dyra.config import Start
from pedyra.pe_dyra.method import PaperMethod, PeDyra


@dataclass(frozen=True, kw_only=True)
class Prune(Shrinking, PaperMethod):
    """PE-DyRA's scores, pruning only (Table 5): from the LoRA's r to the budget of `final_rank`.

    The paper gives neither its initial rank nor its schedule; this one removes equally much at each adjustment, so
    that the final phase runs at the budget of every other method. The other fields are PE-DyRA's.
    """

    moves: None = field(default=None, init=False)  # type: ignore[assignment]

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        initial = max(rank + 1, round(1.5 * rank))
        return Beginning(initial, {"final_rank": rank}, initial / rank)

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        """Prune the lowest triples of all layers, the same amount at every adjustment."""
        return self.prune(1 - now.part_done, scores, now)


@dataclass(frozen=True, kw_only=True)
class Expand(Growing, PaperMethod):
    """PE-DyRA's scores, expansion only (Table 5): from the LoRA's r to the budget of `final_rank`.

    The paper gives neither its initial rank, here half of the final one in comparisons, nor its schedule; this one adds
    equally much at each adjustment, to the layers with the highest Eq. (7), one triple each. The other fields are
    PE-DyRA's.
    """

    moves: None = field(default=None, init=False)  # type: ignore[assignment]

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        if rank < 2:
            raise UserError("expand begins at half of the budget's rank, so nothing can grow at r = 1; raise r")
        return Beginning(rank // 2, {"final_rank": rank}, rank // 2 / rank)

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        units = now.units
        first, last = cost(now.initial_ranks, units), self.final_rank * sum(units.values())
        budget = first + int((last - first) * now.part_done)
        layer_scores = layer_means(scores)
        ranking = sorted(scores, key=lambda name: -layer_scores[name] / units[name])  # stable: ties in layer order
        added = round_robin(ranking, now.ranks, now.max_ranks, units, budget - cost(now.ranks, units))
        return make_plan(scores, {}, added, layer_scores)


@dataclass(frozen=True, kw_only=True)
class RandomMoves(PeDyra):
    """PE-DyRA's moves, at random (Fig. 4a): the paper's causal control. k, schedule and budget are PE-DyRA's.

    What is drawn depends on the seed and the step alone. The paper shuffles the order of importance; a uniform draw of
    triples and of layers is the same in distribution. The scores are tracked and recorded all the same, so that a run
    costs what PE-DyRA's does.
    """

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        random = Random(f"{self.seed}/{now.step}")
        units = now.units
        draws = {name: [random.random() for _ in values] for name, values in scores.items()}
        pruned = lowest(prunable(draws, now.min_rank), now.moves)
        left = {name: rank - len(pruned.get(name, ())) for name, rank in now.ranks.items()}
        freed = sum(len(indices) * units[name] for name, indices in pruned.items())
        ranking = random.sample(list(left), len(left))
        if now.budget == "parameters":  # `plan_adjustment` does so
            ranking, freed = ranking[: max(now.moves, 1)], freed + now.spare
        added = round_robin(ranking, left, now.max_ranks, units, freed) if now.moves else {}
        return make_plan(scores, pruned, added, layer_means(scores))


@dataclass(frozen=True, kw_only=True)
class Mask(PaperMethod):
    """PE-DyRA's scores, lowest ranks masked to zero (Fig. 8): the "temporary zero-masking strategy" of Appendix F.

    The paper says no more of it. At the n-th adjustment the n k triples with the lowest scores are masked; a layer's
    best `min_rank` never. Masking sets E of a triple to 0; it goes on being trained, and counts as come back when a
    later adjustment no longer masks it. Nothing grows, because nothing is free. `omega` "uniform" is the linear
    combination of Fig. 8a. Raises ValueError: E is not trained, so that a masked triple could never come back.
    """

    start: Start = "svd"
    """As of PE-DyRA; Mask takes "svd" alone."""

    prunes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start != "svd":
            raise UserError(f"start is {self.start!r}, but Mask sets E to 0 and lets it learn; use start='svd'")

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        count = now.moves * sum(at <= now.step for at in now.schedule.adjustments)
        masked = lowest(prunable(scores, now.min_rank), count)
        return replace(make_plan(scores, {}, {}, layer_means(scores)), masked=masked)
