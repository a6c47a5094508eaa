"""PE-DyRA in a recipe, on top of LoRA, DoRA, PiSSA or QLoRA, and its ablations, which share its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest, make_plan, prunable, round_robin, spent
from pedyra.errors import UserError
from pedyra.methods.adalora import AdaLoraSettings, Prune, first_and_last_rank
from pedyra.methods.method import Adaptation, Method, Request, adaptive
from pedyra.pe_dyra.scored import PeDyra, ScoredMethod, ScoredSituation


def prepare(request: Request) -> Adaptation:
    """Prune and expand at a conserved budget of layers x lora.r ranks; `request.rank` has fields of `PeDyra`.

    It goes on top of DoRA, PiSSA (`lora.use_dora`, `lora.init`) and QLoRA (`model.quantization`), Tables 11 and 12.
    """
    return adaptive(request.with_lora(), PeDyra(**{"seed": request.seed, **request.rank}))


def prepare_prune(request: Request, settings: AdaLoraSettings) -> Adaptation:
    """Make the ablation "+Prune" (Table 5): from 1.5 lora.r to the budget of lora.r, or as `AdaLoraSettings` say.

    The paper gives neither its initial rank nor its schedule; this one removes equally much at each adjustment, so
    that the final phase runs at the budget of every other method. What the scores, the start and the budget are is
    set as for pedyra, in `rank`.
    """
    request.refuse_lora("its scaling depends on the initial rank", "use_rslora")
    initial, final = first_and_last_rank(settings, request.lora.r)
    alpha = request.lora.lora_alpha * initial / request.lora.r  # the scaling is that of lora.r
    method = request.ablation(Prune, initial=initial, final=final)
    return adaptive(request.with_lora(r=initial, lora_alpha=alpha), method)


@dataclass(frozen=True, kw_only=True)
class Expand(ScoredMethod):
    """The run grows from a uniform rank `initial` to the budget of a uniform rank `final`, by the same amount at every
    adjustment."""

    initial: int
    final: int

    def check_start(self, start: ScoredSituation) -> None:
        """Any start will do: nothing is pruned."""

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        units = now.units
        first, last = self.initial * sum(units.values()), self.final * sum(units.values())
        budget = first + int((last - first) * now.part_done)
        layer_scores = layer_means(scores)
        ranking = sorted(scores, key=lambda name: -layer_scores[name] / units[name])  # stable: ties in layer order
        added = round_robin(ranking, now.ranks, now.max_ranks, units, budget - spent(now.ranks, units))
        return make_plan(scores, {}, added, layer_scores)


def prepare_expand(request: Request) -> Adaptation:
    """Make the ablation "+Expand" (Table 5): it starts at lora.r / 2 and grows to the budget of lora.r.

    The paper gives neither its initial rank nor its schedule; this one adds equally much at each adjustment, to the
    layers with the highest Eq. (7), one triple each. Scores, start and budget are set as for pedyra, in `rank`.
    """
    request.refuse_lora("its scaling depends on the initial rank", "use_rslora")
    final = request.lora.r
    if final < 2:
        raise UserError("lora.r is 1, but method expand starts at half of lora.r, so nothing can grow; raise it")
    initial = final // 2
    model = request.with_lora(r=initial, lora_alpha=request.lora.lora_alpha * initial / final)
    return adaptive(model, request.ablation(Expand, initial=initial, final=final))


@dataclass(frozen=True, kw_only=True)
class RandomMoves(ScoredMethod):
    """No score is read; what is drawn depends on the seed and the step alone."""

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        random = Random(f"{self.seed}/{now.step}")
        units = now.units
        pruned = random_triples(now.ranks, now.moves, now.min_rank, random)
        left = {name: rank - len(pruned.get(name, ())) for name, rank in now.ranks.items()}
        freed = sum(len(indices) * units[name] for name, indices in pruned.items())
        ranking = random.sample(list(left), len(left))
        if now.budget == "parameters":  # `plan_adjustment` does so
            ranking, freed = ranking[: max(now.moves, 1)], freed + now.spare
        added = round_robin(ranking, left, now.max_ranks, units, freed) if now.moves else {}
        return make_plan(scores, pruned, added, layer_means(scores))


def random_triples(ranks: Mapping[str, int], moves: int, min_rank: int, random: Random) -> dict[str, tuple[int, ...]]:
    """Draw `moves` triples, each equally likely, but for those that would leave a layer below `min_rank`."""
    triples = [(name, index) for name, rank in ranks.items() for index in range(rank)]
    random.shuffle(triples)
    pruned: dict[str, list[int]] = {}
    for name, index in triples:
        if sum(map(len, pruned.values())) == moves:
            break
        if ranks[name] - len(pruned.get(name, ())) > min_rank:
            pruned.setdefault(name, []).append(index)
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}


def prepare_random(request: Request) -> Adaptation:
    """Make the paper's causal control (Fig. 4a): random triples pruned and random layers grown; k, schedule and budget
    are pedyra's.

    The paper shuffles the order of importance; a uniform draw of triples and of layers is the same in distribution.
    The scores are tracked and recorded all the same, so that a run costs what pedyra's does.
    """
    return adaptive(request.with_lora(), request.ablation(RandomMoves, "moves"))


@dataclass(frozen=True, kw_only=True)
class Mask(ScoredMethod):
    """At the n-th adjustment the n k triples with the lowest scores are masked; a layer's best `min_rank` never."""

    start: str = "svd"

    def check_start(self, start: ScoredSituation) -> None:
        """Any start will do: nothing is pruned."""

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        count = now.moves * sum(at <= now.step for at in now.schedule.adjustments)
        masked = lowest(prunable(scores, now.min_rank), count)
        return replace(make_plan(scores, {}, {}, layer_means(scores)), masked=masked)


def prepare_mask(request: Request) -> Adaptation:
    """Make PE-DyRA with the "temporary zero-masking strategy" of Appendix F (Fig. 8), which says no more of it.

    Masking sets E of a triple to 0; it goes on being trained, and counts as come back when a later adjustment no longer
    masks it. Nothing grows, because nothing is free. `rank.omega` "uniform" is the linear combination of Fig. 8a.
    Raises ValueError: E is not trained, so that a masked triple could never come back.
    """
    method = request.ablation(Mask, "moves")
    if method.start != "svd":
        raise UserError(
            f"rank.start is {method.start!r}, but method mask sets E to 0 and lets it learn; use rank.start='svd'"
        )
    return adaptive(request.with_lora(), method)


ABLATIONS = (
    Method("prune", "PE-DyRA's scores, pruning only (Table 5)", prepare_prune, AdaLoraSettings, moves_ranks=True),
    Method("expand", "PE-DyRA's scores, expansion only (Table 5)", prepare_expand, moves_ranks=True),
    Method("random", "PE-DyRA's moves, at random (Fig. 4a)", prepare_random, moves_ranks=True),
    Method("mask", "PE-DyRA's scores, lowest ranks masked to zero (Fig. 8)", prepare_mask, moves_ranks=True),
)
METHOD = Method("pedyra", "PE-DyRA, the paper: triples move between layers", prepare, moves_ranks=True)
