"""The contract of a rank-adaptive method: it observes a run, decides at every adjustment, and keeps its own state.

`RankAllocator` knows no method by name. PE-DyRA and most rivals score triples and plan by the scores
(`pedyra.pe_dyra.scored`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.distributed import Average
from pedyra.allocate.schedule import Schedule
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.resize import NewTriples, Replacement


@dataclass(frozen=True, kw_only=True)
class Run:
    """A method decides in this run, and knows this of it."""

    model: nn.Module
    layers: Sequence[AdaptedLayer]
    schedule: Schedule
    average: Average
    """Over the processes that see parts of a batch."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A method is told this of its run at an adjustment, beside what it has observed itself."""

    step: int
    schedule: Schedule
    history: Sequence[dict[str, Any]]
    """The records of the adjustments so far, oldest first."""
    ranks: dict[str, int]
    """Layer -> rank before this adjustment, in the model's order."""
    parameters: dict[str, int]
    """Layer -> number of parameters of one of its triples."""
    spare: int
    """Parameters below the number that the run began with."""


MakeTriples = Callable[[AdaptedLayer, int, torch.Generator], NewTriples]
"""(layer, how many, generator) -> the triples to append."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A method answers an adjustment with this."""

    plan: RankPlan
    scores: Scores
    """The plan was made from these: one a triple, by the indices that the plan has."""
    new_triples: MakeTriples | None = None
    """Makes the new triples; None where none comes."""


class MethodRun:
    """A method in one run. The allocator calls `prepare`, `before_step` and `decide`, in this order."""

    skipped_steps: int = 0
    """Steps left out for a non-finite observation."""

    def observes(self, step: int) -> bool:
        """Say whether scores come from what step `step` (1-based) shows."""
        raise NotImplementedError

    def prepare(self, step: int) -> None:
        """After step `step` (0 before the first): make ready for what the next one is to show."""

    def before_step(self, step: int, loss_scale: float) -> None:
        """The gradients of step `step` are complete; the method may read them and add to them. What no optimizer
        unscales (what hooks saw in the backward pass) is `loss_scale` times as large."""

    def decide(self, now: Situation) -> Decision | None:
        """Say what is to be done at this adjustment; None: too little was measured, it is passed over."""
        raise NotImplementedError

    def resized(self, replacements: Mapping[str, Sequence[Replacement]]) -> None:
        """The decision is carried out; by layer, what replaced its factors."""

    def restart(self, step: int) -> None:
        """After step `step` other triples were loaded: nothing is known of those that are there now."""

    def describe(self) -> dict[str, Any]:
        """Return the method's own fields of the schedule in `RankAllocator.describe`; plain values."""
        return {}

    def snapshot(self, step: int) -> dict[str, Any]:
        """Return fields of `RankAllocator.snapshot`; plain values. `layer_scores`, `grad_norms` and
        `two_thirds_log_variance` are always there, None where they are unknown."""
        return dict.fromkeys(("grad_norms", "layer_scores", "two_thirds_log_variance"))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its state, for a checkpoint."""
        return {}

    def values(self) -> dict[str, Any]:
        """Return the rest of its state, as plain values for JSON."""
        return {}

    def load(self, step: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Do the inverse of both, after step `step` and `restart`, once the factors have the saved ranks; ValueError
        where they do not fit."""

    def release(self) -> None:
        """Leave nothing in the model."""


class RankMethod:
    """A method and its settings, before any run, as a user gives it: `PeDyra(...)`. It has no state, and its class is
    the method."""

    start: str
    """The way triples begin, see `attach`: "lora" or "svd"."""
    trains_e: bool
    """E is a parameter, and no constant 1."""
    seed: int
    """New triples are drawn from it."""
    budget: str
    """A word for what is conserved or aimed at, for the record of the run."""
    compiles: bool = True
    """Observing works in a model that torch compiles."""

    def schedule(self, total_steps: int) -> Schedule:
        """Say when ranks are adjusted; ValueError where they never are."""
        raise NotImplementedError

    def check(self, run: Run, now: Situation) -> None:
        """Raise ValueError where it cannot do its work in this run, which begins at `now`; changes nothing."""

    def begin(self, run: Run) -> MethodRun:
        """Return the method in this run."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, for JSON: a run resumes with the same."""
        raise NotImplementedError


def method_of(config: object) -> RankMethod:
    """Return what was given. Raises ValueError: it is no method, but a dict of settings, say, or the class itself."""
    if not isinstance(config, RankMethod):
        raise UserError(f"config is {config!r}; give a method with its settings, such as PeDyra()")
    return config
