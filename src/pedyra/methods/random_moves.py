"""The paper's causal control (Fig. 4a): PE-DyRA's schedule and number of moves, with the order of importance random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan, round_robin
from pedyra.methods.adapter import adaptive, with_lora
from pedyra.methods.budget import units
from pedyra.methods.method import Adaptation, Method, Request
from pedyra.methods.settings import ablation_settings
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation


@dataclass(frozen=True)
class RandomMoves:
    """A policy that reads no score; what it draws depends on the seed and the step alone."""

    seed: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        random = Random(f"{self.seed}/{now.step}")
        costs = units(now)
        pruned = random_triples(now.ranks, now.moves, now.min_rank, random)
        left = {name: rank - len(pruned.get(name, ())) for name, rank in now.ranks.items()}
        freed = sum(len(indices) * costs[name] for name, indices in pruned.items())
        ranking = random.sample(list(left), len(left))
        if now.budget == "parameters":  # as in `plan_parameters`
            ranking, freed = ranking[: max(now.moves, 1)], freed + now.spare
        added = round_robin(ranking, left, now.max_ranks, costs, freed) if now.moves else {}
        return make_plan(scores, pruned, added, layer_means(scores))


def random_triples(ranks: Mapping[str, int], moves: int, min_rank: int, random: Random) -> dict[str, tuple[int, ...]]:
    """`moves` triples, each equally likely, but for those that would leave a layer below `min_rank`."""
    triples = [(name, index) for name, rank in ranks.items() for index in range(rank)]
    random.shuffle(triples)
    pruned: dict[str, list[int]] = {}
    for name, index in triples:
        if sum(map(len, pruned.values())) == moves:
            break
        if ranks[name] - len(pruned.get(name, ())) > min_rank:
            pruned.setdefault(name, []).append(index)
    return {name: tuple(sorted(indices)) for name, indices in pruned.items()}


def prepare(request: Request) -> Adaptation:
    """PE-DyRA with random triples pruned and random layers grown; k, schedule and budget as for pedyra.

    The paper shuffles the order of importance; a uniform draw of triples and of layers is the same in distribution.
    The scores are tracked and recorded all the same, so that a run costs what pedyra's does.
    """
    config = ablation_settings(request, "moves")
    return adaptive(with_lora(request), ScoredMethod(settings=config, policy=RandomMoves(config.seed)))


METHOD = Method("random", "PE-DyRA's moves, at random (Fig. 4a)", prepare, moves_ranks=True)
