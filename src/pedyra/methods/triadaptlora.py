"""TriAdaptLoRA (Liang et al. 2025): B C A with a core of two triangles, grown where the core's norm rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan, round_robin
from pedyra.allocate.contract import Run, Training, Work
from pedyra.allocate.scored import ScheduledMethod, ScoredSituation
from pedyra.allocate.scores import ScoreState
from pedyra.errors import UserError
from pedyra.lora.attach import attach
from pedyra.lora.factors import AFactor
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples, Replacement
from pedyra.methods.sizes import Growing, check_grows, growth
from pedyra.methods.slots import plain_ranks, refuse_lora

STD = 0.02


class CoreFactor(AFactor):
    """The `lora_A` slot with a core maps x -> (C A) x, C = C_low + C_up `(r, r)`, both with the diagonal.

    E holds the core packed, `(r (r + 1),)`: rank n adds a row of n entries to C_low and a column of n to C_up, so that
    growing appends and moves nothing.
    """

    @property
    def core(self) -> Tensor:
        """C, `(r, r)`"""
        rank = self.out_features
        places = _places(rank).to(self.E.device)
        return self.E.new_zeros(rank * rank).index_add(0, places, self.E).view(rank, rank)

    @property
    def weight(self) -> Tensor:
        return self.core @ self.A

    def identity_e(self, rank: int) -> Tensor:
        """Return the packed core whose C is the identity: half of the diagonal in each triangle."""
        places = _places(rank)
        return torch.where(places % (rank + 1) == 0, 0.5, 0.0)

    def split_weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, self.identity_e(weight.shape[0])  # nothing holds rows of A at a length here


@lru_cache(maxsize=256)
def _places(rank: int) -> Tensor:
    """Return the flat index into C of every packed entry: row n of C_low, column n of C_up, for n = 1, 2, ..."""
    flat = []
    for n in range(rank):
        flat += [n * rank + j for j in range(n + 1)]
        flat += [i * rank + n for i in range(n + 1)]
    return torch.tensor(flat, device="cpu")  # kept, so not where a model is planned without its numbers


class CoreNorms(ScoreState):
    """A layer's score is the increase of ||C||_F / r since the last growth check. It needs no gradient."""

    def __init__(self, run: Run, settings: Any) -> None:
        super().__init__(run, settings, ("previous",))
        self.state["previous"] = self.norms()
        self._checked = self.state["previous"]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return ||C||_F / r of every layer, now."""
        factors: list[Any] = [layer.a for layer in self.layers]
        return torch.stack([factor.core.norm() / factor.out_features for factor in factors])

    def layer_scores(self) -> Tensor:
        self._checked = self.norms()
        return self._checked - self.state["previous"]

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        self.state["previous"] = self._checked  # it stays what it was before the growth


def growing_layers(missing: int, part: float, layers: int) -> int:
    """Return m: int(R c) of the R ranks that are missing, when the part c of the run is over; within [1, L]."""
    return min(max(int(missing * part), 1), layers)


def gaussian_core(rank: int, num: int, generator: torch.Generator) -> Tensor:
    """Draw the packed entries of `num` ranks beyond `rank`, N(0, 0.02^2)."""
    return torch.randn((rank + num) * (rank + num + 1) - rank * (rank + 1), generator=generator) * STD


@dataclass(frozen=True, kw_only=True)
class TriAdaptLora(Growing, ScheduledMethod):
    """TriAdaptLoRA (Liang et al. 2025): B C A with a core C of two triangles, grown where the core's norm rises.

    The total grows from the LoRA's r, which is 1 with the authors, to layers x `final_rank` ranks, final_rank / 2 to a
    layer at a time. dW = (alpha / r) B C A with the current r: growing from r to r' leaves r / r' of the contribution.
    At first A and C ~ N(0, 0.02^2) and B = 0; later ranks are Gaussian throughout. This is the start on which three of
    the authors' seven variants agree; in two others B and C start at zero together, and no gradient is ever other than
    zero. On disk C is folded into A: an ordinary LoRA.

    Departs from the authors' code, and why: the norm is divided by the rank in all cases (their block variants divide
    by the number of blocks); the layers with the highest scores grow, not all at the threshold, and the last one only
    by what is missing, so that the budget is met exactly; what is still missing at the last adjustment is then given
    out one rank each down the ranking; new parameters follow the run's learning rate and Adam's step count, from zero
    moments. Raises ValueError: a LoRA that begins at the final rank or above; rsLoRA or another start.
    """

    orth_weight: float = 0.5
    """Weight of the orthogonality term, the authors'."""

    start = "lora"
    scores = CoreNorms
    always_trains_e = True

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "TriAdaptLoRA")
        if ranks := plain_ranks(model, adapter):
            check_grows(self.final_rank, ranks)
            generator = torch.Generator().manual_seed(self.seed)
            for layer in attach(model, adapter):
                if layer.a.A.requires_grad and bool(layer.b.weight.any()):
                    raise UserError(f"{layer.name} is trained already, and TriAdaptLoRA begins anew; give a fresh LoRA")
                A = nn.Parameter(torch.randn(layer.a.A.shape, generator=generator).to(layer.a.A) * STD)
                E = nn.Parameter(gaussian_core(0, layer.rank, generator).to(layer.a.E))
                layer.module.lora_A[adapter] = CoreFactor(A, E)
        return super().install(model, adapter)

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        layer_scores = layer_means(scores)
        missing = self.final_rank * len(scores) - sum(now.ranks.values())
        if missing == 0:
            return make_plan(scores, {}, {}, layer_scores)
        below = {name: rank for name, rank in now.ranks.items() if rank + self.add <= now.max_ranks[name]}
        if now.is_last:
            ranking = sorted(scores, key=lambda name: -layer_scores[name])
            gains = round_robin(ranking, now.ranks, now.max_ranks, dict.fromkeys(scores, 1), missing)
        else:
            warmup = now.schedule.initial_warmup
            part = (now.step - warmup) / (now.schedule.total_steps - warmup)
            top = growing_layers(missing, part, len(scores))
            gains = growth(layer_scores, below, missing, top, self.add)
        rescale = {name: now.ranks[name] / (now.ranks[name] + gain) for name, gain in gains.items()}
        return make_plan(scores, {}, gains, layer_scores, rescale)

    def new_triples(self, layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
        """Draw A, B and the core's new row and column ~ N(0, 0.02^2)."""
        A = torch.randn(num, layer.a.in_features, generator=generator) * STD
        B = torch.randn(layer.b.out_features, num, generator=generator) * STD
        return NewTriples(A, gaussian_core(layer.rank, num, generator), B)
