"""What a rank-adaptive method is: it observes a run, decides at every adjustment, and keeps its own state.

Two kinds exist. A `pedyra.pe_dyra.scored.ScoredMethod` is scores of triples and a policy over them: the paper and most
baselines. Our default, `pedyra.methods.pedyra.method.Fit`, measures what directions are worth and cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.distributed import Average
from pedyra.allocate.schedule import Schedule
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples, Replacement

Closure = Callable[[], Tensor]
"""The mean loss of a step's batch, computed again."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a method is given of the run that it decides in."""

    model: nn.Module
    layers: Sequence[AdaptedLayer]
    optimizer: Optimizer
    config: RankConfig
    schedule: Schedule
    moves: int
    """Triples moved per adjustment at most, k; 0: the method only observes."""
    average: Average
    """Over the processes that see parts of a batch."""


@dataclass(frozen=True)
class Situation:
    """What is known of a run at an adjustment, beside what the method has observed."""

    step: int
    schedule: Schedule
    history: Sequence[dict[str, Any]]
    """The records of the adjustments so far, oldest first."""
    ranks: dict[str, int]
    """Layer -> rank before this adjustment, in the model's order."""
    moves: int
    """k."""
    min_rank: int
    max_ranks: dict[str, int]
    costs: dict[str, int]
    """Parameters of one triple of each layer."""
    spare: int
    """Parameters below the initial count."""
    budget: str


Born = Callable[[AdaptedLayer, tuple[int, ...], int, torch.Generator], NewTriples]
"""(layer, which of its triples go, how many come, generator) -> the triples to append."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a method does at an adjustment."""

    plan: RankPlan
    scores: Scores
    """Those that the plan was made from, one a triple, the triples being those that the plan counts."""
    born: Born | None = None
    """How new triples begin; None where none comes."""
    new_moments: str = "zero"
    """Adam's second moments of new rows: see `optimizer_state.move_state`."""
    reasons: Mapping[str, Any] = field(default_factory=dict)
    """What the method saw and why it decided so: fields of the record (`allocate.record`), plain values."""


class MethodRun:
    """A method in one run. The allocator calls `prepare`, `before_step` and `decide`, in this order."""

    skipped_steps: int = 0
    """Steps left out for a non-finite observation."""
    settled: bool = False
    """Whether nothing will move any more: the rest of the run is a plain LoRA of these ranks."""

    def observes(self, step: int) -> bool:
        """Whether scores come from what step `step` (1-based) shows."""
        raise NotImplementedError

    def prepare(self, step: int) -> None:
        """After step `step` (0 before the first): make ready for what the next one is to show."""

    def before_step(self, step: int, loss_scale: float, closure: Closure | None) -> None:
        """The gradients of step `step` are complete. What no optimizer unscales is `loss_scale` times as large.
        `closure`, where the loop gives one, is the loss of the step's batch once more."""

    def skip_step(self) -> None:
        """The gradients since the last step are thrown away."""

    def check_state(self) -> None:
        """After the first step that the optimizer takes. Raises ValueError where its state cannot follow the method."""

    def decide(self, now: Situation) -> Decision | None:
        """What to do at this adjustment; None: too little was measured, it is passed over."""
        raise NotImplementedError

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """The decision is carried out; by layer, what replaced its factors."""

    def restart(self, step: int) -> None:
        """After step `step` other triples were loaded: nothing is known of those that are there now."""

    def describe(self) -> dict[str, Any]:
        """Fields of the schedule in `RankAllocator.describe`; plain values. `in_vain`: why nothing can ever move."""
        return {"in_vain": None}

    def snapshot(self, step: int) -> dict[str, Any]:
        """Fields of `RankAllocator.snapshot`: `layer_scores`, `grad_norms`, `two_thirds_log_variance`, or None each."""
        return dict.fromkeys(("grad_norms", "layer_scores", "two_thirds_log_variance"))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its state, for a checkpoint."""
        return {}

    def values(self) -> dict[str, Any]:
        """The rest of its state, as plain values for JSON."""
        return {}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of both, after step `step` and `restart`, once the factors have the saved ranks; ValueError where
        they do not fit."""

    def release(self) -> None:
        """Leave nothing in the model."""


class RankMethod(Protocol):
    """A method and its settings, before any run; it has no state."""

    @property
    def needs_history(self) -> bool:
        """Whether what it does next, or its scaling, follows from what it did: without its state no run goes on."""
        ...

    @property
    def compiles(self) -> bool:
        """Whether it can observe a model that torch compiles."""
        ...

    def trains_e(self, config: RankConfig) -> bool:
        """Whether E is a parameter."""
        ...

    def most_moves(self, config: RankConfig, total_rank: int) -> int:
        """Triples moved per adjustment at most, k."""
        ...

    def schedule(self, config: RankConfig, total_steps: int) -> Schedule:
        """When ranks are adjusted; ValueError where they never are."""
        ...

    def check(self, run: Run, now: Situation) -> None:
        """Raise ValueError where it cannot do its work in this run, which begins at `now`; changes nothing."""
        ...

    def start(self, run: Run) -> MethodRun:
        """The method in this run."""
        ...


def default_method(config: RankConfig) -> RankMethod:
    """The method of a config that comes without one: `pedyra.methods.from_config`.

    Methods are built on this package, which knows that one function of theirs by its name alone, and looks it up when
    it is needed.
    """
    return import_module("pedyra.methods").from_config(config)
