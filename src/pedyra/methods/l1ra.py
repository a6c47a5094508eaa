"""L1RA (Singh et al. 2025): gates in [0, 1] under an L1 penalty; ranks whose gate closes move to the open layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, Scores, make_plan, round_robin, spent
from pedyra.lora.layer import AdaptedLayer, adapted_layers
from pedyra.lora.resize import NewTriples
from pedyra.methods.method import Adaptation, Hooks, Method, Request, Running, Settings, adaptive, setting
from pedyra.methods.own_factors import groups_with_gates
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.scored import ScoredMethod, ScoredSituation
from pedyra.pe_dyra.triple_scores import ScoreState

RANK_SETTINGS: dict[str, Any] = dict(
    interval=0.1,
    initial_warmup=0,
    final_warmup=0,
    alpha=1.0,
    start="lora",
    budget="ranks",
)
"""Of RankSettings: what makes the method; the schedule and the budget are defaults."""


# The authors' values.
GATE_RATE = 1e-2
"""eta_c, the gates' learning rate, constant over the run."""
THRESHOLD = 1e-6
"""A gate below it is closed."""


@dataclass(frozen=True, kw_only=True)
class L1raSettings(Settings):
    """Settings of L1RA."""

    l1: float = setting(1e-3, least=0)
    """lambda: every step takes 0.01 lambda off each gate, which begins at 1, beside what Adam does. The authors' value
    alone closes a gate in 100,000 steps, so a short run wants more."""


class Gates(ScoreState):
    """A triple's score is its gate, E."""

    def __init__(self, layers: Sequence[AdaptedLayer], config: RankSettings) -> None:
        super().__init__(layers, ())

    @torch.no_grad()
    def triple_scores(self) -> dict[str, list[float]]:
        return {layer.name: layer.a.E.tolist() for layer in self.layers}


def closed_gates(scores: Scores) -> dict[str, tuple[int, ...]]:
    """Layer with a gate below the threshold -> the triples of such gates, without the layer's most open one: none where
    it has only that."""
    closed = {}
    for name, gates in scores.items():
        if min(gates) < THRESHOLD:
            best = max(range(len(gates)), key=lambda index: gates[index])
            closed[name] = tuple(index for index, gate in enumerate(gates) if gate < THRESHOLD and index != best)
    return closed


@dataclass(frozen=True)
class MoveClosed:
    """L1RA's policy; `rank` is the uniform rank whose budget is conserved."""

    rank: int

    def __call__(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        closed = closed_gates(scores)
        pruned = {name: indices for name, indices in closed.items() if indices}
        left = {name: rank - len(pruned.get(name, ())) for name, rank in now.ranks.items()}
        lowest = {name: min(gates) for name, gates in scores.items()}
        ranking = sorted((name for name in scores if name not in closed), key=lambda name: -lowest[name])
        units = now.units
        spare = self.rank * sum(units.values()) - spent(left, units)
        return make_plan(scores, pruned, round_robin(ranking, left, now.max_ranks, units, spare), lowest)


def shrink_gates(gates: Tensor, l1: float) -> None:
    """In place: the decoupled L1 step of lambda = `l1`, then into [0, 1]."""
    gates.sub_(GATE_RATE * l1 * gates.sign()).clamp_(0, 1)


def gated_triples(layer: AdaptedLayer, num: int, generator: torch.Generator, *, rank: int) -> NewTriples:
    """An open gate, a ~ N(0, 1 / r^2) with the initial rank, b = 0: the function does not change."""
    A = torch.randn(num, layer.a.in_features, generator=generator) / rank
    return NewTriples(A, torch.ones(num), torch.zeros(layer.b.out_features, num))


class GateHooks(Hooks):
    """Keeps the gates' learning rate constant, and shrinks and clamps them after each optimizer step."""

    def __init__(self, model: PeftModel, l1: float) -> None:
        self.model, self.l1 = model, l1
        self._groups: list[dict[str, Any]] = []

    def begin(self, run: Running) -> None:
        self._groups = run.optimizer.param_groups

    def gradients_complete(self) -> None:
        gate = adapted_layers(self.model)[0].a.E
        for group in self._groups:
            if any(parameter is gate for parameter in group["params"]):
                group["lr"] = GATE_RATE

    @torch.no_grad()
    def stepped(self, step: int, *, skipped: bool = False) -> None:
        if skipped:
            return
        for layer in adapted_layers(self.model):
            shrink_gates(layer.a.E, self.l1)


def prepare(request: Request, settings: L1raSettings) -> Adaptation:
    """L1RA at the conserved budget of lora.r, in ranks (`rank.budget: parameters` counts those instead).

    dW = (alpha / r) B diag(c) A with the initial r; c = 1, A ~ N(0, 1 / r^2) (`lora.init` gaussian), B = 0. Every
    `rank.interval` (0.1 of the run) the ranks with a closed gate are removed, and as many are handed round-robin to
    the layers without a closed gate, the one with the highest lowest gate first.

    Departs from the authors' code, and why: Adam's state follows the kept rows, and that of new ones begins at zero
    (theirs is dropped at every update); when every layer loses a rank, the ranks wait for the next adjustment; where
    all gates of a layer are closed its most open one stays (theirs keeps the last).
    """
    request.refuse_lora("L1RA defines its own scaling", "use_rslora")
    if request.lora.r < 2:
        raise ValueError("lora.r is 1, but L1RA keeps each layer's most open gate, so nothing can move; raise lora.r")
    if request.lora.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f"lora.init is {request.lora.init_lora_weights!r}, but L1RA starts at A ~ N(0, 1/r^2); leave it out"
        )
    config = request.rank_settings(open_fields=("budget", "max_rank"), **RANK_SETTINGS)
    model = request.with_lora(init_lora_weights="gaussian")
    policy = MoveClosed(request.lora.r)
    method = ScoredMethod(
        **config.to_dict(),
        policy=policy,
        scores=Gates,
        new_triples=partial(gated_triples, rank=request.lora.r),
        always_trains_e=True,
    )

    def make_optimizer(kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer:
        layers = adapted_layers(model)
        for layer in layers:
            layer.a.most_e = 1.0  # a gate above it would be cut, and what is loaded with it
        gates: list[Any] = [layer.a.E for layer in layers]
        return kind(groups_with_gates(model, gates, weight_decay, lr=GATE_RATE), **arguments)

    return adaptive(model, method, optimizer=make_optimizer, hooks=GateHooks(model, settings.l1))


METHOD = Method(
    "l1ra", "gates under an L1 penalty; closed ones move (Singh et al. 2025)", prepare, L1raSettings, moves_ranks=True
)
