"""Methods that score triples and plan by the scores: PE-DyRA, its ablations, and most rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pedyra.allocate.allocation import RankPlan, Scores, layer_means
from pedyra.allocate.contract import Decision, MakeTriples, MethodRun, RankMethod, Run, Situation
from pedyra.allocate.distributed import one_process
from pedyra.allocate.schedule import Schedule, resolve_schedule
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples, Replacement
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.equations import two_thirds_log_variance
from pedyra.pe_dyra.input_energy import InputEnergy
from pedyra.pe_dyra.orthogonality import add_orthogonality_gradient, layer_orthogonality
from pedyra.pe_dyra.triple_scores import ScoreState, TripleScores


@dataclass(frozen=True, kw_only=True)
class ScoredSituation(Situation):
    """What a policy is given of an adjustment, beside the scores."""

    moves: int
    """k."""
    min_rank: int
    max_ranks: dict[str, int]
    """Layer -> the rank it may grow to."""
    budget: str
    """"ranks" or "parameters", see `RankSettings`."""

    @property
    def units(self) -> dict[str, int]:
        """What a triple of each layer takes of the budget: 1 of the "ranks", or its "parameters"."""
        return dict.fromkeys(self.parameters, 1) if self.budget == "ranks" else self.parameters

    @property
    def elapsed(self) -> float:
        """(t - t_i) / (T - t_f - t_i): the part of the window of adjustments that is over."""
        of = self.schedule
        return (self.step - of.initial_warmup) / (of.total_steps - of.final_warmup - of.initial_warmup)

    @property
    def part_done(self) -> float:
        """n / N at the n-th of N adjustments: the even spread over the run, 1 at the last."""
        adjustments = self.schedule.adjustments
        return (adjustments.index(self.step) + 1) / len(adjustments)

    @property
    def is_last(self) -> bool:
        """Whether this is the last adjustment of the run."""
        return self.step == self.schedule.adjustments[-1]


Policy = Callable[[Scores, ScoredSituation], RankPlan]
"""Scores -> plan. Must be a pure function: resume replays nothing but continues from the same state."""


ScoreSource = Callable[[Sequence[AdaptedLayer], RankSettings], ScoreState]
"""Makes what observes the layers."""

LEAST_INTERVAL = 2
"""Steps between two adjustments at least, where a new triple takes the place of another. It begins with E or B at zero,
so in its first step its score is exactly zero, and an adjustment after that step would only take it away again."""

MOVED = 0.02
"""k as a part of the total rank, where the settings leave it open: the paper's 12 of 576 (Table 14)."""


def check_movable(start: ScoredSituation) -> None:
    """PE-DyRA moves triples, so some layer must have one to spare: ValueError where none has."""
    highest = max(start.ranks.values())
    if start.moves and highest <= start.min_rank:
        raise ValueError(
            f"nothing can move: every layer starts at rank {highest} and min_rank is {start.min_rank}; raise the "
            f"adapter's r, or lower min_rank"
        )


def unchecked(start: ScoredSituation) -> None:
    """The check of a method that can do its work from any start."""


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(RankSettings, RankMethod):
    """A policy over scores, with the settings of `RankSettings`. `scores` and `new_triples` are PE-DyRA's unless
    it has its own."""

    policy: Policy
    scores: ScoreSource = TripleScores
    new_triples: MakeTriples | None = None
    """For a method that fixes how new triples begin."""
    check_start: Callable[[ScoredSituation], None] = check_movable
    """Called with the situation before the first step; raises ValueError where the method cannot do its work."""
    conserves: bool = False
    """Whether a new triple takes the place of others, so that nothing moves where all layers are at `max_rank`."""
    always_trains_e: bool = False
    """E is trained whatever the start; else where it starts at 0 (`RankSettings.start` "svd")."""

    @property
    def trains_e(self) -> bool:  # type: ignore[override]
        return self.always_trains_e or self.start == "svd"

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return getattr(self.scores, "compiles", ScoreState.compiles)

    def schedule(self, total_steps: int) -> Schedule:
        return resolve_schedule(
            total_steps,
            initial_warmup=self.initial_warmup,
            interval=self.interval,
            final_warmup=self.final_warmup,
            least_interval=LEAST_INTERVAL if self.conserves and self.moves != 0 else 1,
        )

    def check(self, run: Run, now: Situation) -> None:
        if run.average is not one_process and self.scores is not TripleScores:
            raise ValueError(
                "of all methods that score triples only PE-DyRA and those with its scores run in several processes; "
                "train this one in one process"
            )
        limits = growth_limits(run.layers, self.max_rank)
        start = situated(now, self, most_moves(self, sum(now.ranks.values())), limits)
        self.check_start(start)
        if self.conserves and start.moves and all(rank == self.max_rank for rank in now.ranks.values()):
            raise ValueError(
                f"no rank can change: every layer starts at max_rank, {self.max_rank}; raise it, or lower the "
                f"adapter's r"
            )

    def begin(self, run: Run) -> ScoredRun:
        return ScoredRun(self, run)


def most_moves(settings: RankSettings, total_rank: int) -> int:
    """k of a run that begins with this sum of ranks."""
    return max(1, round(MOVED * total_rank)) if settings.moves is None else settings.moves


def growth_limits(layers: Sequence[AdaptedLayer], max_rank: int | None) -> dict[str, int]:
    """Layer -> the rank it may grow to: `max_rank`, and no more than its width.

    A start above the width is allowed, as in PEFT; such a layer does not grow. Raises ValueError: a layer starts above
    `max_rank`.
    """
    limits = {}
    for layer in layers:
        widest = max(layer.rank, min(layer.a.in_features, layer.b.out_features))
        limits[layer.name] = widest if max_rank is None else min(max_rank, widest)
        if layer.rank > limits[layer.name]:
            raise ValueError(f"max_rank is {max_rank}, but {layer.name} starts at rank {layer.rank}; raise max_rank")
    return limits


def situated(now: Situation, settings: RankSettings, moves: int, max_ranks: dict[str, int]) -> ScoredSituation:
    """The situation with the limits that a policy keeps to."""
    known = {field.name: getattr(now, field.name) for field in fields(Situation)}
    return ScoredSituation(
        **known, moves=moves, min_rank=settings.min_rank, max_ranks=max_ranks, budget=settings.budget
    )


class ScoredRun(MethodRun):
    """A scored method in one run."""

    def __init__(self, method: ScoredMethod, run: Run) -> None:
        self.method, self.run = method, run
        self.max_ranks = growth_limits(run.layers, method.max_rank)
        self.moves = most_moves(method, sum(layer.rank for layer in run.layers))
        self.scores = method.scores(run.layers, method)
        self.window = ema_window(max(method.beta1, method.beta2))
        """Steps before an adjustment that an EMA still remembers at it."""
        reads_inputs = method.scores is TripleScores and method.alpha < 1
        self.inputs = InputEnergy(run.model, run.layers, run.average) if reads_inputs else None
        self.last_observed: int | None = None
        """The step that the scores were last told of; the next one goes on from it, and any other begins anew."""
        self._trained_unseen: dict[str, Tensor] = {}
        """Layer whose input was not seen in some step of the window -> whether it had a gradient there, `()`."""

    @property
    def skipped_steps(self) -> int:  # type: ignore[override]
        return int(self.scores.skipped)

    def observes(self, step: int) -> bool:
        adjustment = self.run.schedule.next_adjustment(step)
        return adjustment is not None and adjustment - step < self.window

    def prepare(self, step: int) -> None:
        self.scores.watch(self.observes(step + 1))
        if self.inputs is not None:
            self.inputs.active = self.observes(step + 1)

    def before_step(self, step: int, loss_scale: float) -> None:
        if self.observes(step):
            self._observe(step, loss_scale)
        if weight := self.method.orth_weight:  # after the scores, which see the gradient of the task alone
            add_orthogonality_gradient(self.run.layers, weight=weight, form=self.method.orth_form)

    def _observe(self, step: int, loss_scale: float) -> None:
        # Or this step: a checkpoint on a signal (Trainer's enable_jit_checkpoint) comes between reading and stepping.
        begins, adjusts = self.last_observed not in (step - 1, step), self.run.schedule.is_adjustment(step)
        self.last_observed = step
        if begins:
            self.scores.restart()
            self._trained_unseen = {}
        self.scores.observe_gradients(loss_scale=loss_scale)
        if not isinstance(self.scores, TripleScores):
            return
        if self.inputs is not None:
            seen = self.inputs.collect()
            self._note_unseen(seen)
            if begins or adjusts:  # each look waits for the device
                self._check_seen()
            self.scores.observe_inputs(seen)
        if adjusts:  # Eq. (6) reads the weights that Eq. (3) does
            self.scores.read_weights()

    def _note_unseen(self, mean_squares: Sequence[Tensor | None]) -> None:
        for layer, seen in zip(self.run.layers, mean_squares, strict=True):
            gradients = [factor.grad for factor in layer.factors if factor.grad is not None]
            if seen is None and gradients and layer.rank:
                trained = torch.stack(torch._foreach_norm(gradients)).any()
                self._trained_unseen[layer.name] = trained | self._trained_unseen.get(layer.name, False)

    def _check_seen(self) -> None:
        """Raise ValueError for a layer that was trained and whose input was not seen: Eq. (6) is unknown, not zero."""
        for name, trained in self._trained_unseen.items():
            if trained:
                raise ValueError(
                    f"no input of {name} was seen, although it is trained: something reads its weights and does not "
                    f"call it (a fused kernel of unsloth or axolotl), so its input score, Eq. (6), is unknown; switch "
                    f"the kernel off, or use alpha=1, which needs no inputs"
                )

    def skip_step(self) -> None:
        self.scores.forget()
        if self.inputs is not None:
            self.inputs.forget()

    def decide(self, now: Situation) -> Decision | None:
        if not self.scores.observed:
            return None
        scores = self.scores.triple_scores()
        plan = self.method.policy(scores, situated(now, self.method, self.moves, self.max_ranks))
        return Decision(plan=plan, scores=scores, new_triples=self._new_triples)

    def _new_triples(self, layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
        if self.method.new_triples is not None:
            return self.method.new_triples(layer, num, generator)
        return gaussian_triples(layer, num, start=self.method.start, generator=generator)

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        self.scores.resize(replacements)

    def restart(self, step: int) -> None:
        self.last_observed = None
        self.scores.restart()

    def describe(self) -> dict[str, Any]:
        return {"moves": self.moves}

    def snapshot(self, step: int) -> dict[str, Any]:
        form = self.method.orth_form
        shown = {**super().snapshot(step), "orthogonality": layer_orthogonality(self.run.layers, form=form)}
        if step == 0 or not self.observes(step):
            return shown
        means = layer_means(self.scores.triple_scores())
        names, ranks = [layer.name for layer in self.run.layers], {layer.name: layer.rank for layer in self.run.layers}
        shown["layer_scores"] = means
        if isinstance(self.scores, TripleScores):  # of other methods' scores, Eqs. (5) and (8) say nothing
            shown["grad_norms"] = dict(zip(names, self.scores.norms.tolist(), strict=True))
            shown["two_thirds_log_variance"] = two_thirds_log_variance(means, ranks)
        return shown

    def tensors(self) -> dict[str, Tensor]:
        return self.scores.tensors()

    def values(self) -> dict[str, Any]:
        # The limits too: a layer that began above its width may come back to where it began.
        return {"moves": self.moves, "max_ranks": self.max_ranks, "last_observed": self.last_observed}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.moves, self.max_ranks = values["moves"], values["max_ranks"]
        self.last_observed = values["last_observed"]
        self.scores.load_tensors(tensors)

    def release(self) -> None:
        if self.inputs is not None:
            self.inputs.remove()
        self.scores.watch(False)


def gaussian_triples(layer: AdaptedLayer, num: int, *, start: str, generator: torch.Generator) -> NewTriples:
    """Random triples that change nothing yet: B = 0 after a "lora" start, E = 0 after an "svd" start (AdaLoRA's). The
    paper says "initialized for critical directions" and not how. Drawn on the CPU: the same whatever the device."""
    width, out = layer.a.in_features, layer.b.out_features
    # 1 / (3 in): the variance of PEFT's Kaiming-uniform start; 0.02: AdaLoRA's initial std.
    std = (3 * width) ** -0.5 if start == "lora" else 0.02
    rows = torch.randn(num, width, generator=generator) * std
    if start == "lora":
        return NewTriples(rows, torch.ones(num), torch.zeros(out, num))
    return NewTriples(rows, torch.zeros(num), (torch.randn(num, out, generator=generator) * std).T)


FORGOTTEN = 1e-6
"""What is left of a value in an average that has forgotten it."""


def ema_window(beta: float) -> int:
    """Steps W after which an EMA with `beta`, and an EMA of its deviations, have forgotten all before.

    Sensitivity forgets as beta^W. The uncertainty of Eq. (3) follows the sensitivity's own start-up error, which
    adds a factor 1 + W (1 - beta). For 0.85 this gives 103 steps.
    """
    if beta == 0:
        return 1
    window = math.ceil(math.log(FORGOTTEN) / math.log(beta))
    while (1 + window * (1 - beta)) * beta**window > FORGOTTEN:
        window += 1
    return window
