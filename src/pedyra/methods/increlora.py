"""IncreLoRA (Zhang F. et al. 2023): layers start at rank 1 and the important ones grow, from ranks held in reserve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan
from pedyra.allocate.contract import Run
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer, adapted_layers
from pedyra.lora.resize import NewTriples
from pedyra.methods.method import Adaptation, Hooks, Method, Request, Running, adaptive
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.equations import update_sensitivity_
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation
from pedyra.pe_dyra.triple_scores import ScoreState

RESERVE_E = 1e-5
_BLOCK_ELEMENTS = 1 << 20
"""A block of one layer's dense gradient has at most so many entries: 4 MB."""
RANK_SETTINGS: dict[str, Any] = dict(alpha=1.0, start="svd", budget="ranks", orth_weight=0.1, min_rank=0)
"""Fields of RankSettings that make the method; the orthogonality weight is a default."""


def dense_sensitivity(x: Tensor, gradient: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """Return sum |dW * dL/d dW| / sqrt(out in) of the update dW = B diag(E) A, in blocks of rows.

    Args:
        x: input of the A slot, `(..., in)`.
        gradient: dL / d(output of the B slot), `(..., out)`; with it the scaling, which dW has too, cancels.
    """
    x, gradient = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    weight = E.float()[:, None] * A.float()
    total = weight.new_zeros(())
    rows = max(1, _BLOCK_ELEMENTS // A.shape[1])
    for g, b in zip(gradient.split(rows, 1), B.float().split(rows, 0), strict=True):
        total += ((b @ weight) * (g.T @ x)).abs().sum()
    return total / (A.shape[1] * B.shape[0]) ** 0.5


class DenseSensitivity(ScoreState):
    """Eq. (3)'s two averages of `dense_sensitivity` are kept; a layer's score is their product.

    Hooks on the two slots see the input and, in the backward pass, the gradient; the dense gradient is never kept. With
    gradient accumulation the values of the micro-batches are summed, where |sum| of all would need it.
    """

    compiles = False

    def __init__(self, run: Run, settings: RankSettings) -> None:
        super().__init__(run, settings, ("sensitivity", "uncertainty"))
        self.now = torch.zeros_like(self.state["sensitivity"])
        """The backward passes of this step have added so much so far."""
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def layer_scores(self) -> Tensor:
        return self.state["sensitivity"] * self.state["uncertainty"]

    def watch(self, active: bool) -> None:
        if active and not self._handles:
            for index, layer in enumerate(self.layers):
                see_input = lambda module, args, index=index: self._inputs.update({index: args[0].detach()})  # noqa: E731
                see_output = lambda module, args, output, index=index: self._see_output(index, output)  # noqa: E731
                self._handles.append(layer.a.register_forward_pre_hook(see_input))
                self._handles.append(layer.b.register_forward_hook(see_output))
        elif not active:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._inputs.clear()

    def restart(self) -> None:
        for value in self.state.values():
            value.zero_()

    def forget(self) -> None:
        self.now = torch.zeros_like(self.now)

    @torch.no_grad()
    def observe(self, *, loss_scale: float, begins: bool, adjusts: bool) -> None:
        averages, of = (self.state["sensitivity"], self.state["uncertainty"]), self.settings
        self.skipped += ~update_sensitivity_(*averages, self.now / loss_scale, beta1=of.beta1, beta2=of.beta2)
        self.forget()

    def _see_output(self, index: int, output: Tensor) -> None:
        x = self._inputs.pop(index, None)
        if x is None or not output.requires_grad:
            return
        layer = self.layers[index]

        @torch.no_grad()
        def see_gradient(gradient: Tensor) -> None:
            self.now[index] += dense_sensitivity(x, gradient, layer.a.A, layer.a.E, layer.b.weight)

        output.register_hook(see_gradient)


def growth(
    layer_scores: Mapping[str, float], active: Mapping[str, int], missing: int, top: int, add: int
) -> dict[str, int]:
    """Return layer -> ranks it gains: `add` for each of the `top` highest, never more than `missing` in all.

    Ties fall in layer order; the authors' threshold lets all of them grow, beyond the budget.
    """
    gains: dict[str, int] = {}
    for name in sorted(active, key=lambda name: -layer_scores[name])[:top]:
        gains[name] = min(add, missing)
        missing -= gains[name]
        if missing == 0:
            break
    return gains


@dataclass(frozen=True, kw_only=True)
class GrowFromReserve(ScoredMethod):
    """IncreLoRA's plan: a layer's last `add` triples are its reserve, dropped when the budget is met."""

    scores = DenseSensitivity

    final: int
    add: int
    """Ranks a growing layer gains, and holds in reserve."""

    def closed(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether the reserves are gone: the adjustment that drops them is the only one that adds nothing."""
        return any(not record["added"] for record in history)

    def check_start(self, start: ScoredSituation) -> None:
        """Raise ValueError where the budget cannot be met within the schedule."""
        layers, adjustments = len(start.ranks), len(start.schedule.adjustments)
        grown = min(self._top(start), layers)
        reachable = grown * self.add * adjustments
        missing = layers * (self.final - 1)
        if reachable < missing:
            raise UserError(
                f"{adjustments} adjustments of {grown} layers x {self.add} ranks add {reachable} of the {missing} "
                f"ranks up to the budget; shorten rank.interval"
            )

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        layer_scores = layer_means(scores)
        if self.closed(now.history):
            return make_plan(scores, {}, {}, layer_scores)
        active = {name: rank - self.add for name, rank in now.ranks.items()}
        missing = self.final * len(active) - sum(active.values())
        below = {name: rank for name, rank in active.items() if rank + self.add <= now.max_ranks[name]}
        gains = growth(layer_scores, below, missing, self._top(now), self.add)
        rescale = {name: active[name] / (active[name] + gain) for name, gain in gains.items()}
        if gains and sum(gains.values()) < missing and not now.is_last:
            return make_plan(scores, {}, gains, layer_scores, rescale)
        # The budget is met, or no layer can grow: what is not activated of the reserve goes.
        unused = {name: self.add - gains.get(name, 0) for name in active}
        pruned = {name: tuple(range(now.ranks[name] - n, now.ranks[name])) for name, n in unused.items() if n}
        return make_plan(scores, pruned, {}, layer_scores, rescale)

    def new_triples(self, layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
        """Draw A, B ~ N(0, 0.02^2); E is 1e-5."""
        A = torch.randn(num, layer.a.in_features, generator=generator) * 0.02
        B = torch.randn(layer.b.out_features, num, generator=generator) * 0.02
        return NewTriples(A, torch.full((num,), RESERVE_E), B)

    def _top(self, now: ScoredSituation) -> int:
        """Return h, as many layers as reach the budget by the last adjustment."""
        missing = len(now.ranks) * (self.final - 1)
        return math.ceil(missing / (self.add * len(now.schedule.adjustments)))


class ReserveHooks(Hooks):
    """The reserve's E stays as it is while its A and B learn in advance, and stays out of the norm that is clipped."""

    def __init__(self, method: GrowFromReserve) -> None:
        self.method = method
        self._allocator: RankAllocator | None = None
        self._handles: list[RemovableHandle] = []

    def begin(self, run: Running) -> None:
        self.end()
        self._allocator = run.allocator
        assert run.allocator is not None
        self._handles = [layer.a.E.register_hook(self._without_reserve) for layer in run.allocator.layers]

    @torch.no_grad()
    def stepped(self, step: int, *, skipped: bool = False) -> None:
        assert self._allocator is not None
        if not self.method.closed(self._allocator.history):
            for layer in self._allocator.layers:
                layer.a.E[-self.method.add :] = RESERVE_E  # weight decay needs no gradient

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _without_reserve(self, gradient: Tensor) -> Tensor | None:
        assert self._allocator is not None
        if self.method.closed(self._allocator.history):
            return None
        gradient = gradient.clone()
        gradient[-self.method.add :] = 0
        return gradient


def prepare(request: Request) -> Adaptation:
    """Make IncreLoRA from rank 1 per layer to a total of layers x lora.r ranks, reached by the last adjustment at
    latest.

    A layer gains lora.r / 2 ranks at a time, the authors' default, which their scripts keep but for MNLI and SQuAD (1).
    It holds as many in reserve with E = 1e-5 fixed, whose A and B already learn ("advance learning"), so the trainable
    parameters are those of the active ranks plus the reserve until the budget is met.
    Scaling is alpha / active rank, as the authors have it: a layer that grows from r to r' keeps r / r' of its
    contribution. Score: `DenseSensitivity`.

    Departs from the authors' code, and why: exactly the top h layers grow (their threshold overshoots the budget at
    ties, after which their clean-up never runs); new rows follow the run's learning rate and step count from zero
    moments, and so does the E of a rank that is activated (theirs join as new groups with a restarted warm-up each, for
    which schedulers have no place); growth follows the optimizer step; the dense gradient of a layer is formed in
    blocks and never kept; the orthogonality term is of a layer's whole matrix, as AdaLoRA's is, where theirs takes each
    entry of a ParameterList alone: one row at the default start, so that it holds lengths and no angles, and is 2.2
    times smaller there. `rank.orth_weight: 0` switches it off.
    """
    request.refuse_lora("IncreLoRA defines its own start and scaling", "init", "use_rslora")
    final = request.lora.r
    if final < 2:
        raise UserError("lora.r is 1, but IncreLoRA starts at rank 1 and grows to lora.r; raise it to 2 or more")
    config = request.rank_settings(
        open_fields=("beta1", "beta2", "orth_weight"),
        **RANK_SETTINGS,
    )
    add = final // 2
    model = request.with_lora(r=1 + add, lora_alpha=request.lora.lora_alpha * (1 + add))
    method = GrowFromReserve(**config.to_dict(), final=final, add=add)
    adaptation = adaptive(model, method, hooks=ReserveHooks(method))
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.a.E[1:] = RESERVE_E
    return adaptation


METHOD = Method(
    "increlora",
    "grows by the update's sensitivity (Zhang F. et al. 2023)",
    prepare,
    moves_ranks=True,
)
