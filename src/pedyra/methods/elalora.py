"""ElaLoRA (Chang et al. 2025): prune and expand by the weakest triples of each layer, at a conserved budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, lowest, make_plan
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples
from pedyra.methods.adalora import RANK_SETTINGS
from pedyra.methods.method import Adaptation, Method, Request, adaptive
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation

PER_LAYER = 2
"""k: candidates per layer, and so the most ranks it can lose or gain at once; that of the authors' GLUE scripts."""


def candidates(scores: Scores) -> list[tuple[float, int, int, str]]:
    """(score, layer position, triple, layer) of each layer's min(k, r - 1) lowest triples, lowest first."""
    found = []
    for position, (name, values) in enumerate(scores.items()):
        order = sorted(range(len(values)), key=lambda index: (values[index], index))
        found += [(values[index], position, index, name) for index in order[: min(PER_LAYER, len(values) - 1)]]
    return sorted(found)


def exchange(
    ordered: list[tuple[float, int, int, str]],
    moves: int,
    ranks: Mapping[str, int],
    max_ranks: Mapping[str, int],
    units: Mapping[str, int],
    spare: int,
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Prune the `moves` lowest candidates; the highest ones bring their layers a rank each, while affordable."""
    pruned = lowest(ordered, moves)
    spare += sum(units[name] * len(indices) for name, indices in pruned.items())
    added: dict[str, int] = {}
    for _, _, _, name in sorted(ordered, key=lambda candidate: -candidate[0]):
        if sum(added.values()) == moves:
            break
        rank = ranks[name] - len(pruned.get(name, ())) + added.get(name, 0)
        if units[name] <= spare and rank < max_ranks[name]:
            added[name] = added.get(name, 0) + 1
            spare -= units[name]
    return pruned, added


@dataclass(frozen=True)
class Elastic:
    """ElaLoRA's policy: b(t) = round(b_0 (1 - p^3)) over the window, with b_0 = `moves`."""

    moves: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        ordered = candidates(scores)
        moves = min(round(self.moves * (1 - now.elapsed**3)), len(ordered))
        spare = now.spare if now.budget == "parameters" else 0
        pruned, added = exchange(ordered, moves, now.ranks, now.max_ranks, now.units, spare)
        return make_plan(scores, pruned, added, layer_means(scores))


def orthogonal_rows(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors `(num, width)`, orthogonal to the span of `rows` and to each other where the width allows
    it."""
    fresh = torch.randn(num, rows.shape[1], generator=generator)
    stacked = torch.cat([rows.float().cpu(), fresh])
    # QR of (old | new) columns: its later columns are the new directions, freed of all earlier ones.
    free = torch.linalg.qr(stacked.T).Q.T[len(rows) :]  # (num, width), fewer where there are more rows than dimensions
    random = fresh[len(free) :]  # what cannot be orthogonal
    return torch.cat([free, random / random.norm(dim=1, keepdim=True)])


def orthogonal_triples(layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
    """Unit vectors orthogonal to the layer's rows and columns, and e = min(min |E|, 1e-13)."""
    E = layer.a.E.detach().abs()
    smallest = min(float(E.min()), 1e-13) if len(E) else 1e-13
    A = orthogonal_rows(layer.a.A.detach(), num, generator)
    B = orthogonal_rows(layer.b.weight.detach().T, num, generator)
    return NewTriples(A, torch.full((num,), smallest), B.T)


def prepare(request: Request) -> Adaptation:
    """ElaLoRA at the conserved budget of lora.r, in ranks (`rank.budget: parameters` counts those instead).

    Start, scaling (alpha / lora.r) and scores are AdaLoRA's. Each layer offers its k lowest triples, never its last;
    the b lowest of all offers go, and the layers of the b highest, whose weakest triples are still strong, grow.

    Departs from the authors' code, and why: Adam's state follows the kept rows, and that of new ones begins at zero
    (theirs builds a new optimizer at each adjustment, which loses all of it, drops the weight-decay groups, and leaves
    the schedule on the old one, so that the learning rate stays at its peak); exactly b triples go (their `<=` takes
    all ties); new rows are orthogonal to the span of the old ones (their single Gram-Schmidt pass is so only for
    orthonormal rows); the scores read the weight before the optimizer step.
    """
    request.refuse_lora("ElaLoRA defines its own start and scaling", "init", "use_rslora")
    if request.lora.r < 2:
        raise ValueError("lora.r is 1, but ElaLoRA never takes a layer's last rank, so nothing can move; raise lora.r")
    config = request.rank_settings(
        open_fields=("moves", "beta1", "beta2", "orth_weight", "budget", "max_rank"),
        **RANK_SETTINGS,
        moves=4,
    )
    if config.moves is None:
        raise ValueError("rank.moves is null, but ElaLoRA's b_0 is a number of ranks; the paper's is 4")
    method = ScoredMethod(
        **config.to_dict(), policy=Elastic(config.moves), new_triples=orthogonal_triples, conserves=True
    )
    return adaptive(request.with_lora(), method)


METHOD = Method("elalora", "moves by each layer's weakest triples (Chang et al. 2025)", prepare, moves_ranks=True)
