"""ElaLoRA (Chang et al. 2025): prune and expand by the weakest triples of each layer, at a conserved budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import Budget, RankPlan, Scores, layer_means, lowest, make_plan, prunable
from pedyra.allocate.contract import Training, Work
from pedyra.allocate.schedule import check_count
from pedyra.allocate.scored import ScheduledMethod, ScoredSituation
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples
from pedyra.methods.slots import plain_ranks, refuse_lora

PER_LAYER = 2
"""k: candidates per layer, and so the most ranks it can lose or gain at once; that of the authors' GLUE scripts."""
SILENT_E = 1e-13
"""E of a new triple, at most."""


@dataclass(frozen=True, kw_only=True)
class ElaLora(ScheduledMethod):
    """ElaLoRA (Chang et al. 2025): the weakest triples go, and layers whose weakest triples are strong grow.

    The budget is that of the LoRA's r; start, scaling (alpha / r) and scores are AdaLoRA's. Each layer offers its k = 2
    lowest triples, never its last; the b lowest of all offers go, and the layers of the b highest grow. b falls over
    the window of adjustments as b(t) = round(b_0 (1 - p^3)), p being the part of it that is over.

    Departs from the authors' code, and why: Adam's state follows the kept rows, and that of new ones begins at zero
    (theirs builds a new optimizer at each adjustment, which loses all of it, drops the weight-decay groups, and leaves
    the schedule on the old one, so that the learning rate stays at its peak); exactly b triples go (their `<=` takes
    all ties); new rows are orthogonal to the span of the old ones (their single Gram-Schmidt pass is so only for
    orthonormal rows); the scores read the weight before the optimizer step. Raises ValueError: a LoRA of r = 1; rsLoRA
    or another start.
    """

    moves: int = 4
    """b_0: ranks that move at the first adjustment at most, the authors'."""
    orth_weight: float = 0.1
    """Weight of the orthogonality term, as in AdaLoRA."""
    budget: Budget = "ranks"
    """What is conserved: the sum of the "ranks", or the number of "parameters"."""

    conserves = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("moves", self.moves, 1)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "ElaLoRA")
        if (ranks := plain_ranks(model, adapter)) and max(ranks) < 2:
            raise UserError(
                "the LoRA has r = 1, but ElaLoRA never takes a layer's last rank, so nothing can move; raise r"
            )
        return super().install(model, adapter)

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        offers = candidates(scores)
        moves = min(round(self.moves * (1 - now.elapsed**3)), len(offers))
        spare = now.spare if now.budget == "parameters" else 0
        pruned, added = exchange(offers, moves, now.ranks, now.max_ranks, now.units, spare)
        return make_plan(scores, pruned, added, layer_means(scores))

    def new_triples(self, layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
        """Draw unit vectors orthogonal to the layer's rows and columns, and e = min(min |E|, 1e-13)."""
        E = layer.a.E.detach().abs()
        smallest = min(float(E.min()), SILENT_E) if len(E) else SILENT_E
        A = orthogonal_rows(layer.a.A.detach(), num, generator)
        B = orthogonal_rows(layer.b.weight.detach().T, num, generator)
        return NewTriples(A, torch.full((num,), smallest), B.T)


def candidates(scores: Scores) -> list[tuple[float, int, int, str]]:
    """List (score, layer position, triple, layer) of each layer's min(k, r - 1) lowest triples, lowest first."""
    of_layers = groupby(prunable(scores, min_rank=1), key=itemgetter(3))
    return sorted(offer for _, offers in of_layers for offer in islice(offers, PER_LAYER))


def exchange(
    offers: list[tuple[float, int, int, str]],
    moves: int,
    ranks: Mapping[str, int],
    max_ranks: Mapping[str, int],
    units: Mapping[str, int],
    spare: int,
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Prune the `moves` lowest candidates; the highest ones bring their layers a rank each, while affordable."""
    pruned = lowest(offers, moves)
    spare += sum(units[name] * len(indices) for name, indices in pruned.items())
    added: dict[str, int] = {}
    for _, _, _, name in sorted(offers, key=lambda candidate: -candidate[0]):
        if sum(added.values()) == moves:
            break
        rank = ranks[name] - len(pruned.get(name, ())) + added.get(name, 0)
        if units[name] <= spare and rank < max_ranks[name]:
            added[name] = added.get(name, 0) + 1
            spare -= units[name]
    return pruned, added


def orthogonal_rows(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Draw unit vectors `(num, width)`, orthogonal to the span of `rows (r, width)` and to each other where the width
    allows it."""
    fresh = torch.randn(num, rows.shape[1], generator=generator)
    stacked = torch.cat([rows.float().cpu(), fresh])
    # QR of (old | new) columns: its later columns are the new directions, freed of all earlier ones.
    free = torch.linalg.qr(stacked.T).Q.T[len(rows) :]  # (num, width), fewer where there are more rows than dimensions
    random = fresh[len(free) :]  # what cannot be orthogonal
    return torch.cat([free, random / random.norm(dim=1, keepdim=True)])
