"""IncreLoRA (Zhang F. et al. 2023): layers begin at rank 1 and the important ones grow, from ranks in reserve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import RankPlan, Scores, layer_means, make_plan
from pedyra.allocate.contract import Run, Training, Work
from pedyra.allocate.scored import ScheduledMethod, ScoredRun, ScoredSituation
from pedyra.allocate.scores import ScoreState, update_sensitivity_
from pedyra.errors import UserError
from pedyra.lora.attach import attach
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples
from pedyra.methods.sizes import Growing, check_grows, growth
from pedyra.methods.slots import grow, plain_ranks, refuse_lora

RESERVE_E = 1e-5
_BLOCK_ELEMENTS = 1 << 20
"""A block of one layer's dense gradient has at most so many entries: 4 MB."""


def dense_sensitivity(x: Tensor, gradient: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """Return sum |dW * dL/d dW| / sqrt(out in) of the update dW = B diag(E) A, in blocks of rows, from the input of the
    A slot `(..., in)` and dL / d(output of the B slot) `(..., out)`, with which the scaling, that dW has too, cancels.
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

    def __init__(self, run: Run, settings: Any) -> None:
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
                self._handles.append(layer.a.register_forward_pre_hook(partial(self._see_input, index)))
                self._handles.append(layer.b.register_forward_hook(partial(self._see_output, index)))
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

    def _see_input(self, index: int, module: Any, args: tuple[Tensor, ...]) -> None:
        self._inputs[index] = args[0].detach()

    def _see_output(self, index: int, module: Any, args: Any, output: Tensor) -> None:
        x = self._inputs.pop(index, None)
        if x is None or not output.requires_grad:
            return
        layer = self.layers[index]

        @torch.no_grad()
        def see_gradient(gradient: Tensor) -> None:
            self.now[index] += dense_sensitivity(x, gradient, layer.a.A, layer.a.E, layer.b.weight)

        output.register_hook(see_gradient)


@dataclass(frozen=True, kw_only=True)
class IncreLora(Growing, ScheduledMethod):
    """IncreLoRA (Zhang F. et al. 2023): layers begin at rank 1 and those of the most sensitive updates grow.

    The total grows from the LoRA's r, which is 1 with the authors, to layers x `final_rank` ranks, reached by the last
    adjustment at latest. A layer gains final_rank / 2 ranks at a time, the authors' default, which their scripts keep
    but for MNLI and SQuAD (1). It holds as many in reserve with E = 1e-5 fixed, whose A and B already learn ("advance
    learning"), so the trainable parameters are those of the active ranks plus the reserve until the budget is met.
    Scaling is alpha / active rank, as the authors have it: a layer that grows from r to r' keeps r / r' of its
    contribution. Score: `DenseSensitivity`. A, B ~ N(0, 0.02^2), E = 0.

    Departs from the authors' code, and why: exactly the top h layers grow (their threshold overshoots the budget at
    ties, after which their clean-up never runs); new rows follow the run's learning rate and step count from zero
    moments, and so does the E of a rank that is activated (theirs join as new groups with a restarted warm-up each, for
    which schedulers have no place); growth follows the optimizer step; the dense gradient of a layer is formed in
    blocks and never kept; the orthogonality term is of a layer's whole matrix, as AdaLoRA's is, where theirs takes each
    entry of a ParameterList alone: one row at the default start, so that it holds lengths and no angles, and is 2.2
    times smaller there. Raises ValueError: a LoRA that begins at the final rank or above; rsLoRA or another start.
    """

    orth_weight: float = 0.1
    """Weight of the orthogonality term; 0 switches it off."""

    min_rank = 0
    scores = DenseSensitivity

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "IncreLoRA")
        if ranks := plain_ranks(model, adapter):
            check_grows(self.final_rank, ranks)
            grow(model, adapter, self.add)
            for layer in attach(model, adapter, self.start, self.seed):
                with torch.no_grad():
                    layer.a.E[-self.add :] = RESERVE_E
        return super().install(model, adapter)

    def check_start(self, start: ScoredSituation) -> None:
        """Raise ValueError where the budget cannot be met within the schedule."""
        layers, adjustments = len(start.ranks), len(start.schedule.adjustments)
        growing = min(self._top(start), layers)
        reachable = growing * self.add * adjustments
        if reachable < (missing := self._missing(start.initial_ranks)):
            raise UserError(
                f"{adjustments} adjustments of {growing} layers x {self.add} ranks add {reachable} of the {missing} "
                f"ranks up to the budget; shorten interval"
            )

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        layer_scores = layer_means(scores)
        if is_closed(now.history):
            return make_plan(scores, {}, {}, layer_scores)
        active = {name: rank - self.add for name, rank in now.ranks.items()}
        missing = self._missing(now.ranks)
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
        """Draw A, B ~ N(0, 0.02^2), AdaLoRA's; E is 1e-5."""
        return super().new_triples(layer, num, generator)._replace(E=torch.full((num,), RESERVE_E))

    def begin(self, run: Run, start: ScoredSituation) -> ReserveRun:
        return ReserveRun(self, run, start)

    def _missing(self, ranks: Mapping[str, int]) -> int:
        """Count the ranks up to the budget, where layers have these with their reserves."""
        return len(ranks) * (self.final_rank + self.add) - sum(ranks.values())

    def _top(self, now: ScoredSituation) -> int:
        """Return h, as many layers as reach the budget by the last adjustment."""
        return math.ceil(self._missing(now.initial_ranks) / (self.add * len(now.schedule.adjustments)))


def is_closed(history: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether the reserves are gone: the adjustment that drops them is the only one that adds nothing."""
    return any(not record["added"] for record in history)


class ReserveRun(ScoredRun):
    """The reserve's E stays as it is while its A and B learn in advance, and stays out of the norm that is clipped."""

    method: IncreLora

    def __init__(self, method: IncreLora, run: Run, start: ScoredSituation) -> None:
        super().__init__(method, run, start)
        self.history = start.history
        self._handles = [layer.a.E.register_hook(self._without_reserve) for layer in run.layers]

    def prepare(self, step: int) -> None:
        super().prepare(step)
        self._hold()

    def decide(self, now: ScoredSituation) -> tuple[RankPlan, Scores] | None:
        self._hold()
        return super().decide(now)

    def release(self) -> None:
        super().release()
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _hold(self) -> None:
        """Weight decay needs no gradient."""
        if not is_closed(self.history):
            for layer in self.run.layers:
                layer.a.E[-self.method.add :] = RESERVE_E

    def _without_reserve(self, gradient: Tensor) -> Tensor | None:
        if is_closed(self.history):
            return None
        gradient = gradient.clone()
        gradient[-self.method.add :] = 0
        return gradient
