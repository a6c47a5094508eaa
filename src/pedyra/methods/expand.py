"""Expand only (Table 5): PE-DyRA's scores and expansion, nothing is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan, round_robin
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.budget import part_done, spent, uniform, units
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.settings import ablation_settings, refuse_lora, require
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation, unchecked


@dataclass(frozen=True)
class Expand:
    """From a uniform rank `initial` to the budget of a uniform rank `final`, the same amount at every adjustment."""

    initial: int
    final: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        costs = units(now)
        first, last = uniform(self.initial, costs), uniform(self.final, costs)
        budget = first + int((last - first) * part_done(now))
        layer_scores = layer_means(scores)
        ranking = sorted(scores, key=lambda name: -layer_scores[name] / costs[name])  # stable: ties in layer order
        added = round_robin(ranking, now.ranks, now.max_ranks, costs, budget - spent(now.ranks, costs))
        return make_plan(scores, {}, added, layer_scores)


@dataclass(frozen=True, kw_only=True)
class ExpandSettings:
    """Settings of the expand-only ablation."""

    initial_rank: int | None = None
    """Rank of each layer at the start. None: half of lora.r, at least 1."""

    def __post_init__(self) -> None:
        rank = self.initial_rank
        require(rank is None or rank >= 1, f"method_settings.initial_rank is {rank}; a rank is at least 1")


def prepare(request: Request, settings: ExpandSettings) -> Adaptation:
    """The ablation "+Expand": starts at lora.r / 2 and grows to the budget of lora.r.

    The paper gives neither its initial rank nor its schedule; this one adds equally much at each adjustment, to the
    layers with the highest Eq. (7), one triple each. Scores, start and budget are set as for pedyra, in
    `rank`.
    """
    refuse_lora(request, "its scaling depends on the initial rank", "use_rslora")
    config = ablation_settings(request)
    final = request.lora.r
    initial = max(1, final // 2) if settings.initial_rank is None else settings.initial_rank
    if initial >= final:
        raise ValueError(
            f"method expand starts at rank {initial} and grows to lora.r, {final}, so nothing can grow; raise lora.r "
            f"or lower method_settings.initial_rank"
        )
    model = with_lora(request, r=initial, lora_alpha=request.lora.lora_alpha * initial / final)
    return adaptive(model, ScoredMethod(settings=config, policy=Expand(initial, final), check_start=unchecked))


METHOD = Method("expand", "PE-DyRA's scores, expansion only (Table 5)", prepare, ExpandSettings, moves_ranks=True)
