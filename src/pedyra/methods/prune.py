"""Prune only (Table 5): PE-DyRA's scores and pruning, nothing grows."""

from __future__ import annotations

from dataclasses import dataclass

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan
from pedyra.methods.adalora import AdaLoraSettings, first_and_last_rank
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.budget import lowest_worth, part_done, spent, uniform, units
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.settings import ablation_settings, refuse_lora
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation


@dataclass(frozen=True)
class Prune:
    """From a uniform rank `initial` to the budget of a uniform rank `final`, the same amount at every adjustment."""

    initial: int
    final: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        costs = units(now)
        first, last = uniform(self.initial, costs), uniform(self.final, costs)
        budget = last + int((first - last) * (1 - part_done(now)))
        pruned = lowest_worth(scores, costs, spent(now.ranks, costs) - budget, now.min_rank)
        return make_plan(scores, pruned, {}, layer_means(scores))


def prepare(request: Request, settings: AdaLoraSettings) -> Adaptation:
    """The ablation "+Prune": starts at 1.5 lora.r and ends at the budget of lora.r, or as `AdaLoraSettings` say.

    The paper gives neither its initial rank nor its schedule; this one removes equally much at each adjustment, so
    that the final phase runs at the budget of every other method. What the scores, the start and the budget are is
    set as for pedyra, in `rank`.
    """
    refuse_lora(request, "its scaling depends on the initial rank", "use_rslora")
    config = ablation_settings(request)
    initial, final = first_and_last_rank(settings, request.lora.r)
    alpha = request.lora.lora_alpha * initial / request.lora.r  # the scaling is that of lora.r
    model = with_lora(request, r=initial, lora_alpha=alpha)
    return adaptive(model, ScoredMethod(settings=config, policy=Prune(initial, final)))


METHOD = Method("prune", "PE-DyRA's scores, pruning only (Table 5)", prepare, AdaLoraSettings, moves_ranks=True)
