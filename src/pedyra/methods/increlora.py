"""IncreLoRA (Zhang F. et al. 2023): layers start at rank 1 and the important ones grow, from ranks held in reserve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.callback import RankCallback
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.rule import Rule, Situation
from pedyra.lora.attach import AdaptedLayer, adapted_layers
from pedyra.lora.resize import NewTriples
from pedyra.methods.adapter import with_lora
from pedyra.methods.adaptive import adaptive
from pedyra.methods.budget import is_last, means, plan
from pedyra.methods.dense_sensitivity import DenseSensitivity
from pedyra.methods.method import Adaptation
from pedyra.methods.settings import method_settings, rank_config, refuse_lora, require
from pedyra.recipe import Recipe
from pedyra.tasks import Task

RESERVE_E = 1e-5
RANK_SETTINGS: dict[str, Any] = dict(alpha=1.0, start="svd", budget="ranks", orth_weight=0.1, min_rank=0)
"""Of RankConfig: what makes the method; the orthogonality weight is a default."""


@dataclass(frozen=True, kw_only=True)
class IncreLoraSettings:
    """Settings of IncreLoRA."""

    top: int | None = None
    """h: layers that grow at each adjustment. None: as many as reach the budget by the last adjustment."""
    add: int | None = None
    """Ranks a growing layer gains, and holds in reserve. None: lora.r / 2, the authors' default (their scripts: 1)."""

    def __post_init__(self) -> None:
        for name in ("top", "add"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"method_settings.{name} is {value}; at least 1")


def growth(
    layer_scores: Mapping[str, float], active: Mapping[str, int], missing: int, top: int, add: int
) -> dict[str, int]:
    """Layer -> ranks it gains: `add` for each of the `top` highest, never more than `missing` in all.

    Ties fall in layer order; the authors' threshold lets all of them grow, beyond the budget.
    """
    gains: dict[str, int] = {}
    for name in sorted(active, key=lambda name: -layer_scores[name])[:top]:
        gains[name] = min(add, missing)
        missing -= gains[name]
        if missing == 0:
            break
    return gains


@dataclass(frozen=True)
class GrowFromReserve:
    """IncreLoRA's policy. A layer's last `add` triples are its reserve, dropped when the budget is met."""

    final: int
    add: int
    top: int | None

    def closed(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the reserves are gone: that adjustment is the only one that adds nothing."""
        return any(not record["added"] for record in history)

    def check(self, start: Situation) -> None:
        """Raise ValueError where the budget cannot be met within the schedule."""
        layers, adjustments = len(start.ranks), len(start.schedule.adjustments)
        grown = min(self._top(start), layers)
        reachable = grown * self.add * adjustments
        missing = layers * (self.final - 1)
        if reachable < missing:
            top = "" if self.top is None else f"method_settings.top is {self.top}: "
            raise ValueError(
                f"{top}{adjustments} adjustments of {grown} layers x {self.add} ranks add {reachable} of the {missing} "
                f"ranks up to the budget; {'raise it, or ' if top else ''}shorten rank.interval"
            )

    def __call__(self, scores: Scores, now: Situation) -> RankPlan:
        layer_scores = means(scores)
        if self.closed(now.history):
            return plan(scores, {}, {}, layer_scores)
        active = {name: rank - self.add for name, rank in now.ranks.items()}
        missing = self.final * len(active) - sum(active.values())
        below = {name: rank for name, rank in active.items() if rank + self.add <= now.max_ranks[name]}
        gains = growth(layer_scores, below, missing, self._top(now), self.add)
        rescale = {name: active[name] / (active[name] + gain) for name, gain in gains.items()}
        if gains and sum(gains.values()) < missing and not is_last(now):
            return plan(scores, {}, gains, layer_scores, rescale)
        # The budget is met, or no layer can grow: what is not activated of the reserve goes.
        unused = {name: self.add - gains.get(name, 0) for name in active}
        pruned = {name: tuple(range(now.ranks[name] - n, now.ranks[name])) for name, n in unused.items() if n}
        return plan(scores, pruned, {}, layer_scores, rescale)

    def _top(self, now: Situation) -> int:
        if self.top is not None:
            return self.top
        missing = len(now.ranks) * (self.final - 1)
        return math.ceil(missing / (self.add * len(now.schedule.adjustments)))


def reserve_triples(layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
    """A, B ~ N(0, 0.02^2) and E = 1e-5."""
    A = torch.randn(num, layer.a.in_features, generator=generator) * 0.02
    B = torch.randn(layer.b.out_features, num, generator=generator) * 0.02
    return NewTriples(A, torch.full((num,), RESERVE_E), B)


def hold_reserve(allocator: RankAllocator) -> list[RemovableHandle]:
    """Give the reserve's E no gradient from now on, and so no part in the norm that is clipped; A and B learn."""
    policy: Any = allocator.rule.policy
    assert isinstance(policy, GrowFromReserve)

    def without_reserve(gradient: Tensor) -> Tensor | None:
        if policy.closed(allocator.history):
            return None
        gradient = gradient.clone()
        gradient[-policy.add :] = 0
        return gradient

    return [layer.a.E.register_hook(without_reserve) for layer in allocator.layers]


class FreezeReserve(TrainerCallback):
    """Keeps the reserve's E as it is while its A and B learn in advance."""

    def __init__(self, ranks: RankCallback, policy: GrowFromReserve) -> None:
        self.ranks, self.policy = ranks, policy
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.ranks.allocator is not None
        self._let_go()
        self._handles = hold_reserve(self.ranks.allocator)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        allocator = self.ranks.allocator
        assert allocator is not None
        if self.policy.closed(allocator.history):
            return
        with torch.no_grad():
            for layer in allocator.layers:
                layer.a.E[-self.policy.add :] = RESERVE_E  # weight decay needs no gradient

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()


def prepare(base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None) -> Adaptation:
    """IncreLoRA from rank 1 per layer to a total of layers x lora.r ranks, reached by the last adjustment at latest.

    Every layer holds `add` further ranks in reserve with E = 1e-5 fixed, whose A and B already learn ("advance
    learning"), so the trainable parameters are those of the active ranks plus the reserve until the budget is met.
    Scaling is alpha / active rank, as the authors have it: a layer that grows from r to r' keeps r / r' of its
    contribution. Score: `DenseSensitivity`.

    Departs from the authors' code, and why: exactly the top h layers grow (their threshold overshoots the budget at
    ties, after which their clean-up never runs); new rows follow the run's learning rate with Adam's second moment
    seeded from the kept rows (theirs join as new groups with a restarted warm-up each, for which schedulers have no
    place); growth follows the optimizer step; the dense gradient of a layer is formed in blocks and never kept.
    """
    settings = method_settings(recipe, IncreLoraSettings)
    refuse_lora(recipe, "IncreLoRA defines its own start and scaling", "init", "use_rslora")
    final = recipe.lora.r
    if final < 2:
        raise ValueError("lora.r is 1, but IncreLoRA starts at rank 1 and grows to lora.r; raise it to 2 or more")
    config = rank_config(
        recipe,
        open_fields=("beta1", "beta2", "orth_weight"),
        **RANK_SETTINGS,
    )
    add = final // 2 if settings.add is None else settings.add
    model = with_lora(base_model, recipe, r=1 + add, alpha=recipe.lora.alpha * (1 + add))
    policy = GrowFromReserve(final, add, settings.top)
    rule = Rule(
        policy=policy,
        scores=DenseSensitivity,
        new_triples=reserve_triples,
        check=policy.check,
        new_moments="seed",
        goes_by_history=True,
    )
    adaptation = adaptive(model, config, rule, record_to)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.a.E[1:] = RESERVE_E
    (ranks,) = adaptation.callbacks
    assert isinstance(ranks, RankCallback)
    return Adaptation(model=model, callbacks=[ranks, FreezeReserve(ranks, policy)])
