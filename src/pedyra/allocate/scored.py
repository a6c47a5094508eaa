"""PE-DyRA and most rivals score triples and plan by the scores: what they share, and their part in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import Budget, RankPlan, Scores, layer_means
from pedyra.allocate.contract import Method, Run, Training, Work
from pedyra.allocate.orthogonality import add_orthogonality_gradient, layer_orthogonality
from pedyra.allocate.schedule import Schedule, check_fields, check_word, resolve_schedule
from pedyra.allocate.scores import ScoreState, Sensitivity
from pedyra.errors import UserError
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples


@dataclass(frozen=True, kw_only=True)
class ScoredSituation:
    """A method is told this of its run at an adjustment: `ScoredMethod.plan` sees the scores beside it."""

    step: int
    schedule: Schedule
    history: Sequence[dict[str, Any]]
    """The records of the adjustments so far, oldest first."""
    ranks: dict[str, int]
    """Layer -> rank before this adjustment, in the model's order."""
    initial_ranks: dict[str, int]
    """Layer -> rank that the run began with."""
    parameters: dict[str, int]
    """Layer -> number of parameters of one of its triples."""
    spare: int
    """Parameters below the number that the run began with."""
    moves: int
    """k."""
    min_rank: int
    max_ranks: dict[str, int]
    """Layer -> the rank it may grow to."""
    budget: Budget

    @property
    def units(self) -> dict[str, int]:
        """Return what a triple of each layer takes of the budget: 1 of the "ranks", or its "parameters"."""
        return dict.fromkeys(self.parameters, 1) if self.budget == "ranks" else self.parameters

    @property
    def elapsed(self) -> float:
        """Return (t - t_i) / (T - t_f - t_i), the part of the window of adjustments that is over."""
        of = self.schedule
        return (self.step - of.initial_warmup) / (of.total_steps - of.final_warmup - of.initial_warmup)

    @property
    def part_done(self) -> float:
        """Return n / N at the n-th of N adjustments: the even spread over the run, 1 at the last."""
        adjustments = self.schedule.adjustments
        return (adjustments.index(self.step) + 1) / len(adjustments)

    @property
    def is_last(self) -> bool:
        """Tell whether this is the last adjustment of the run."""
        return self.step == self.schedule.adjustments[-1]


RATIO_EVERY, RATIOS = 5, 101
"""The size of Eq. (2)'s gradient beside the task's is taken at every fifth step, and the last so many are kept."""

LEAST_INTERVAL = 2
"""Steps between two adjustments at least, where a new triple takes the place of another. It begins with E or B at zero,
so in its first step its score is exactly zero, and an adjustment after that step would only take it away again."""

MOVED = 0.02
"""k as a part of the total rank, where the settings leave it open: the paper's 12 of 576 (Table 14)."""


class ScoredMethod(Method):
    """A method moves ranks by scores. A subclass says how, in `plan`; what it does not have for itself is AdaLoRA's."""

    interval: int | float
    initial_warmup: int | float
    final_warmup: int | float
    moves: int | None = None
    budget: Budget = "ranks"
    """What is conserved or aimed at."""
    min_rank: int = 1
    max_rank: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    start: str = "svd"
    """The way triples begin, see `attach`: "lora" or "svd"."""
    seed: int
    """New triples are drawn from it."""
    orth_weight: float = 0.0
    orth_form: str = "norm"

    scores: ClassVar[type[ScoreState]] = Sensitivity
    conserves: ClassVar[bool] = False
    """A new triple takes the place of others, so that nothing moves where all layers are at `max_rank`."""
    prunes: ClassVar[bool] = True
    """Triples have to be there that can go."""
    always_trains_e: ClassVar[bool] = False
    """E is trained whatever the start; else where it starts at 0 ("svd")."""

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        """Put triples into the adapter, see `attach`; A and B stay the Parameters that they are."""
        train_e(attach(model, adapter, self.start, self.seed), self.always_trains_e or self.start == "svd")
        work = Work()
        work.ranks = self
        return work

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        """Make the adjustment. It must be a pure function: a resume replays nothing."""
        raise NotImplementedError

    def check_start(self, start: ScoredSituation) -> None:
        """Raise ValueError where the method cannot work from this start: here, where no layer has a triple to spare."""
        highest = max(start.ranks.values())
        if self.prunes and start.moves and highest <= start.min_rank:
            raise UserError(
                f"nothing can move: every layer starts at rank {highest} and min_rank is {start.min_rank}; raise the "
                f"adapter's r, or lower min_rank"
            )

    def new_triples(self, layer: AdaptedLayer, num: int, generator: torch.Generator) -> NewTriples:
        """Draw triples that change nothing yet: B = 0 after a "lora" start, E = 0 after an "svd" start (AdaLoRA's). The
        paper does not say how. On the CPU they are the same whatever the device."""
        width, out = layer.a.in_features, layer.b.out_features
        # 1 / (3 in): the variance of PEFT's Kaiming-uniform start; 0.02: AdaLoRA's initial std.
        std = (3 * width) ** -0.5 if self.start == "lora" else 0.02
        rows = torch.randn(num, width, generator=generator) * std
        if self.start == "lora":
            return NewTriples(rows, torch.ones(num), torch.zeros(out, num))
        return NewTriples(rows, torch.zeros(num), (torch.randn(num, out, generator=generator) * std).T)

    @property
    def in_processes(self) -> bool:  # type: ignore[override]
        return self.scores.in_processes

    @property
    def compiles(self) -> bool:
        """Tell whether observing works in a model that torch compiles."""
        return self.scores.compiles

    def schedule(self, total_steps: int) -> Schedule:
        """Say when ranks are adjusted; ValueError where they never are."""
        return resolve_schedule(
            total_steps,
            initial_warmup=self.initial_warmup,
            interval=self.interval,
            final_warmup=self.final_warmup,
            least_interval=LEAST_INTERVAL if self.conserves and self.moves != 0 else 1,
        )

    def check(self, run: Run, start: ScoredSituation) -> None:
        """Raise ValueError where it cannot do its work in this run, which begins at `start`; changes nothing."""
        if run.average.processes > 1 and not self.in_processes:
            raise UserError(
                "of all methods that score triples only PE-DyRA and those with its scores run in several processes; "
                "train this one in one process"
            )
        self.check_start(start)
        if self.conserves and start.moves and all(rank == self.max_rank for rank in start.ranks.values()):
            raise UserError(
                f"no rank can change: every layer starts at max_rank, {self.max_rank}; raise it, or lower the "
                f"adapter's r"
            )

    def begin(self, run: Run, start: ScoredSituation) -> ScoredRun:
        """Return the method in this run."""
        return ScoredRun(self, run, start)


@dataclass(frozen=True, kw_only=True)
class ScheduledMethod(ScoredMethod):
    """A scored method with a schedule, the same for all that do not say otherwise."""

    interval: int | float = 0.05
    """Optimizer steps between adjustments; a float below 1 is a fraction of the run."""
    initial_warmup: int | float = 0.05
    """Steps before the first interval begins, or a fraction."""
    final_warmup: int | float = 0.25
    """The length of the last phase, without adjustments, or a fraction."""
    seed: int = 0
    """Seed of what is drawn; it is never drawn from torch's global generator."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_word("budget", self.budget, get_args(Budget))


def most_moves(settings: ScoredMethod, total_rank: int) -> int:
    """Return k of a run that begins with this sum of ranks."""
    return max(1, round(MOVED * total_rank)) if settings.moves is None else settings.moves


def growth_limits(layers: Sequence[AdaptedLayer], max_rank: int | None) -> dict[str, int]:
    """Return layer -> the rank it may grow to: `max_rank`, and no more than its width; where it starts above that, as
    PEFT allows, its start. Raises ValueError: a layer starts above `max_rank`."""
    limits = {}
    for layer in layers:
        widest = max(layer.rank, min(layer.a.in_features, layer.b.out_features))
        limits[layer.name] = widest if max_rank is None else min(max_rank, widest)
        if layer.rank > limits[layer.name]:
            raise UserError(f"max_rank is {max_rank}, but {layer.name} starts at rank {layer.rank}; raise max_rank")
    return limits


class ScoredRun:
    """A method in one run. The allocator calls `prepare`, `before_step` and `decide`, in this order."""

    def __init__(self, method: ScoredMethod, run: Run, start: ScoredSituation) -> None:
        self.method, self.run = method, run
        self.moves, self.max_ranks = start.moves, start.max_ranks
        self.scores = method.scores(run, method)
        self.window = ema_window(max(method.beta1, method.beta2))
        """Steps before an adjustment that an EMA still remembers at it."""
        self.ratios = torch.zeros(RATIOS, device=run.layers[0].a.A.device)
        """The norm of Eq. (2)'s gradient over that of the task's, of the last steps at which it was taken; else 0."""
        self.last_observed: int | None = None
        """The step that the scores were last told of; the next one goes on from it, and any other begins anew."""

    @property
    def skipped_steps(self) -> int:
        """Count the steps that were left out for a non-finite observation."""
        return int(self.scores.skipped)

    def observes(self, step: int) -> bool:
        """Say whether scores come from what step `step` (1-based) shows."""
        adjustment = self.run.schedule.next_adjustment(step)
        return adjustment is not None and adjustment - step < self.window

    def prepare(self, step: int) -> None:
        """After step `step` (0 before the first): make ready for what the next one is to show."""
        self.scores.watch(self.observes(step + 1))

    def before_step(self, step: int, loss_scale: float) -> None:
        """Read the complete gradients of step `step`, and add Eq. (2)'s to them; see `ScoreState.observe`."""
        if self.observes(step):
            # This step, where a checkpoint on a signal (enable_jit_checkpoint) came between reading and stepping.
            begins = self.last_observed not in (step - 1, step)
            self.last_observed = step
            if begins:
                self.scores.restart()
            adjusts = step in self.run.schedule.adjustments
            self.scores.observe(loss_scale=loss_scale, begins=begins, adjusts=adjusts)
        if weight := self.method.orth_weight:  # after the scores, which see the gradient of the task alone
            ratio = add_orthogonality_gradient(
                self.run.layers, weight=weight, form=self.method.orth_form, measure=step % RATIO_EVERY == 0
            )
            if ratio is not None:
                self.ratios[step // RATIO_EVERY % RATIOS] = ratio

    def decide(self, now: ScoredSituation) -> tuple[RankPlan, Scores] | None:
        """Return the plan of this adjustment, and the scores that it is made from; None: too little was measured."""
        if not self.scores.observed:
            return None
        scores = self.scores.triple_scores()
        return self.method.plan(scores, now), scores

    def restart(self) -> None:
        """Forget what was observed: other triples were loaded, and nothing is known of these."""
        self.last_observed = None
        self.scores.restart()

    def snapshot(self, step: int) -> dict[str, Any]:
        """Return fields of `RankAllocator.snapshot`, plain values; None: it is unknown."""
        snapshot: dict[str, Any] = dict.fromkeys(("grad_norms", "layer_scores", "two_thirds_log_variance"))
        snapshot["orthogonality"] = layer_orthogonality(self.run.layers, form=self.method.orth_form)
        if len(ratios := self.ratios[self.ratios > 0]):
            snapshot["orthogonality_ratio"] = float(ratios.median())
        if step == 0 or not self.observes(step):
            return snapshot
        means = layer_means(self.scores.triple_scores())
        return {**snapshot, "layer_scores": means, **self.scores.details(means)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its state, for a checkpoint."""
        return {**self.scores.tensors(), "ratios": self.ratios}

    def values(self) -> dict[str, Any]:
        """Return the rest of its state, as plain values for JSON."""
        # The limits too: a layer that began above its width may come back to where it began.
        return {"moves": self.moves, "max_ranks": self.max_ranks, "last_observed": self.last_observed}

    def load(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Do the inverse of both, after `restart`, once the factors have the saved ranks."""
        self.moves, self.max_ranks = values["moves"], values["max_ranks"]
        self.last_observed = values["last_observed"]
        self.ratios = tensors["ratios"].to(self.ratios.device, copy=True)
        self.scores.load_tensors(tensors)

    def release(self) -> None:
        """Leave nothing in the model."""
        self.scores.release()


FORGOTTEN = 1e-6
"""An average has forgotten a value of which it holds no more than this."""


def ema_window(beta: float) -> int:
    """Return the steps W after which an EMA with `beta`, and one of its deviations, have forgotten all before: the
    sensitivity as beta^W, the uncertainty of Eq. (3), which follows its error, as (1 + W (1 - beta)) beta^W."""
    window = 1
    while (1 + window * (1 - beta)) * beta**window > FORGOTTEN:
        window += 1
    return window
