"""AdaLoRA's algorithm (Zhang et al. 2023) with ranks that really go: parameters, gradients and moments shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest_worth, make_plan, spent
from pedyra.methods.adalora import AdaLoraSettings, first_and_last_rank
from pedyra.methods.method import Adaptation, Method, Request, adaptive
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation

RANK_SETTINGS: dict[str, Any] = dict(
    alpha=1.0, omega="uniform", score_norm="none", start="svd", budget="ranks", orth_weight=0.1
)
"""Of RankSettings: AdaLoRA's scores and start; the budget and the orthogonality weight are defaults."""


def cubic_budget(first: int, last: int, part: float) -> int:
    """b(t) between b_0 and b_T when `part` of the window is over: int(b_T + (b_0 - b_T) (1 - part)^3)."""
    return int(last + (first - last) * (1 - part) ** 3)


@dataclass(frozen=True)
class CubicPruning:
    """One global threshold: the triples with the lowest scores go until the budget b(t) is met."""

    initial: int
    final: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        costs = now.units
        part = 1.0 if now.is_last else now.elapsed
        budget = cubic_budget(self.initial * sum(costs.values()), self.final * sum(costs.values()), part)
        pruned = lowest_worth(scores, costs, spent(now.ranks, costs) - budget, now.min_rank)
        return make_plan(scores, pruned, {}, layer_means(scores))


def prepare(request: Request, settings: AdaLoraSettings) -> Adaptation:
    """AdaLoRA from 1.5 lora.r to the budget of lora.r, or as `AdaLoraSettings` say, in ranks (or `rank.budget`).

    Scores are AdaLoRA's: sensitivity times uncertainty, the mean over A's row and B's column plus E, and one global
    order. A layer may lose all of its ranks. A, B ~ N(0, 0.02^2), E = 0; the orthogonality term is the un-squared
    norm averaged over the matrices, weight 0.1 (the scripts use 0.3 for RTE and STS-B). Scaling is alpha / initial
    rank for the whole run, alpha being `lora.alpha`.

    Departs from the authors' code, and why: pruned triples are removed with their moments, where theirs are only
    zeroed and come back between two maskings; the scores read the weight before the optimizer step, theirs after it
    (its gradient belongs to the former); b_T is reached at the last adjustment, theirs at T - t_f, and no later one
    follows here; the scaling lacks their 1e-5 in the denominator.
    """
    request.refuse_lora("AdaLoRA defines its own start and scaling", "init", "use_rslora")
    config = request.rank_settings(
        open_fields=("beta1", "beta2", "orth_weight", "budget", "min_rank"),
        **RANK_SETTINGS,
        min_rank=0,
    )
    initial, final = first_and_last_rank(settings, request.lora.r)
    model = request.with_lora(r=initial)
    return adaptive(model, ScoredMethod(**config.to_dict(), policy=CubicPruning(initial, final)))


METHOD = Method("adalora-svd", "AdaLoRA with ranks that are removed", prepare, AdaLoraSettings, moves_ranks=True)
