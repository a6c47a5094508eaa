"""Methods that score triples and plan by the scores: the paper, its ablations, and most baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import RankPlan, Scores, layer_means
from pedyra.allocate.checks import check_movable, check_room
from pedyra.allocate.contract import Closure, Decision, MethodRun, Run, Situation
from pedyra.allocate.distributed import one_process
from pedyra.allocate.schedule import Schedule, ema_window, resolve_schedule
from pedyra.config import Importance, RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples, Replacement
from pedyra.pe_dyra.equations import plan_adjustment, plan_parameters, two_thirds_log_variance
from pedyra.pe_dyra.input_energy import InputEnergy
from pedyra.pe_dyra.new_triples import gaussian_triples
from pedyra.pe_dyra.triple_scores import TripleScores

Policy = Callable[[Scores, Situation], RankPlan]
"""Scores -> plan. Must be a pure function: resume replays nothing but continues from the same state."""


class ScoreState(Protocol):
    """Where a method's scores come from: it observes the optimizer steps that `ScoredRun.observes`."""

    skipped: Tensor
    """Number of steps left out for a non-finite observation."""

    def watch(self, active: bool) -> None:
        """Told before each step whether it will be observed, for sources that look at more than gradients."""

    def restart(self) -> None:
        """Forget what was observed: a new window of observed steps begins."""

    def observe_gradients(self, *, loss_scale: float = 1.0) -> None:
        """One optimizer step, its gradients complete; what was seen beside them is `loss_scale` times as large."""

    def triple_scores(self, *, alpha: float, score_norm: str, input_norm: str, omega: str) -> dict[str, list[float]]:
        """The score of every triple by layer name, in the model's order; changes nothing."""
        ...

    def resize(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """Called at every adjustment, after its resizes (perhaps none) are installed."""

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a checkpoint."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; ValueError where they do not fit."""


ScoreSource = Callable[[nn.Module, Sequence[AdaptedLayer], RankConfig], ScoreState]
"""Makes what observes the layers of a model."""

MOVED = 0.02
"""k as a part of the total rank, where the config leaves it open: the paper's 12 of 576 (Table 14)."""


def unchecked(start: Situation) -> None:
    """The check of a method that can do its work from any start."""


@dataclass(frozen=True, kw_only=True)
class ScoredMethod:
    """A policy over scores. Of `scores` and `new_triples`, what is None is the paper's: a `RankMethod`."""

    policy: Policy
    scores: ScoreSource | None = None
    new_triples: Callable[[AdaptedLayer, int, torch.Generator], NewTriples] | None = None
    """(layer, how many, generator) -> the triples to append, for a method that fixes how they begin."""
    check_start: Callable[[Situation], None] = check_movable
    """Called with the situation before the first step; raises ValueError where the method cannot do its work."""
    conserves: bool = False
    """Whether a new triple takes the place of others, so that nothing moves where all layers are at `max_rank`."""
    train_e: bool | None = None
    """Whether E is trained. None: where it starts at 0 (`RankConfig.start` "svd"), or nothing would be learned."""
    new_moments: str = "zero"
    """Adam's second moments of new rows: see `optimizer_state.move_state`."""
    needs_history: bool = False
    """Whether what it does next, or its scaling, follows from what it did: without the record no run goes on."""
    compiles = True

    def trains_e(self, config: RankConfig) -> bool:
        return config.start == "svd" if self.train_e is None else self.train_e

    def most_moves(self, config: RankConfig, total_rank: int) -> int:
        return max(1, round(MOVED * total_rank)) if config.moves is None else config.moves

    def schedule(self, config: RankConfig, total_steps: int) -> Schedule:
        return resolve_schedule(
            total_steps,
            initial_warmup=config.initial_warmup,
            interval=config.interval,
            final_warmup=config.final_warmup,
        )

    def check(self, run: Run, now: Situation) -> None:
        if run.average is not one_process and self.scores is not None:
            raise ValueError(
                "this method's scores are measured by each process alone, so that processes would decide differently; "
                "train it in one process"
            )
        self.check_start(now)
        if self.conserves:
            check_room(run.layers, run.config)

    def start(self, run: Run) -> ScoredRun:
        return ScoredRun(self, run)


class ScoredRun(MethodRun):
    """A scored method in one run."""

    def __init__(self, method: ScoredMethod, run: Run) -> None:
        self.method, self.run = method, run
        self.importance = importance = run.config.importance or Importance()
        if method.scores is None:
            self.scores: ScoreState = TripleScores(
                run.layers,
                beta1=importance.beta1,
                beta2=importance.beta2,
                omega_ema=importance.omega_ema,
                gradients=importance.alpha > 0,
            )
        else:
            self.scores = method.scores(run.model, run.layers, run.config)
        self.window = ema_window(max(importance.beta1, importance.beta2))
        """Steps before an adjustment that an EMA still remembers at it."""
        reads_inputs = method.scores is None and importance.alpha < 1
        self.inputs = InputEnergy(run.model, run.layers, run.average) if reads_inputs else None

    @property
    def skipped_steps(self) -> int:
        return int(self.scores.skipped)

    def observes(self, step: int) -> bool:
        adjustment = self.run.schedule.next_adjustment(step)
        return adjustment is not None and adjustment - step < self.window

    def prepare(self, step: int) -> None:
        self.scores.watch(self.observes(step + 1))
        if self.inputs is not None:
            self.inputs.active = self.observes(step + 1)

    def before_step(self, step: int, loss_scale: float, closure: Closure | None) -> None:
        if not self.observes(step):
            return
        if not self.observes(step - 1):
            self.scores.restart()
        self.scores.observe_gradients(loss_scale=loss_scale)
        if not isinstance(self.scores, TripleScores):
            return
        if self.inputs is not None:
            self.scores.observe_inputs(self.inputs.collect())
        if self.run.schedule.is_adjustment(step):  # Eq. (6) reads the weights that Eq. (3) does
            self.scores.read_weights(input_norm=self.importance.input_norm)

    def skip_step(self) -> None:
        if self.inputs is not None:
            self.inputs.forget()

    def triple_scores(self) -> dict[str, list[float]]:
        """The score of every triple by layer, from what was observed so far."""
        of = self.importance
        return self.scores.triple_scores(
            alpha=of.alpha, score_norm=of.score_norm, input_norm=of.input_norm, omega=of.omega
        )

    def decide(self, now: Situation) -> Decision:
        scores = self.triple_scores()
        plan = self.method.policy(scores, now)
        return Decision(plan=plan, scores=scores, born=self._born, new_moments=self.method.new_moments)

    def _born(self, layer: AdaptedLayer, pruned: tuple[int, ...], num: int, generator: torch.Generator) -> NewTriples:
        if self.method.new_triples is not None:
            return self.method.new_triples(layer, num, generator)
        return gaussian_triples(layer, num, start=self.run.config.start, generator=generator)

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        self.scores.resize(replacements)

    def restart(self, step: int) -> None:
        self.scores.restart()

    def snapshot(self, step: int) -> dict[str, Any]:
        if step == 0 or not self.observes(step):
            return super().snapshot(step)
        means = layer_means(self.triple_scores(), {})
        own = isinstance(self.scores, TripleScores)
        names, ranks = [layer.name for layer in self.run.layers], {layer.name: layer.rank for layer in self.run.layers}
        norms = self.scores.norms.tolist() if isinstance(self.scores, TripleScores) else None
        return {
            "grad_norms": norms and dict(zip(names, norms, strict=True)),
            "layer_scores": means,
            # Of other methods' scores, which may be negative, Eq. (8) says nothing.
            "two_thirds_log_variance": two_thirds_log_variance(means, ranks) if own else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        return self.scores.tensors()

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.scores.load_tensors(tensors)

    def release(self) -> None:
        if self.inputs is not None:
            self.inputs.remove()
        self.scores.watch(False)


@dataclass(frozen=True)
class Algorithm2:
    """The paper's policy, at the budget in force."""

    layer_score: str = "before"
    """Eq. (7) on the triples "before" or "after" the pruning of the same adjustment."""

    def __call__(self, scores: Scores, now: Situation) -> RankPlan:
        limits: Any = dict(moves=now.moves, min_rank=now.min_rank, max_ranks=now.max_ranks)
        if now.budget == "ranks":
            return plan_adjustment(scores, **limits, layer_score=self.layer_score)
        return plan_parameters(scores, **limits, costs=now.costs, spare=now.spare, layer_score=self.layer_score)


def paper_method(importance: Importance) -> ScoredMethod:
    """PE-DyRA as the paper has it."""
    return ScoredMethod(policy=Algorithm2(importance.layer_score), conserves=True)
