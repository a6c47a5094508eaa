"""The contract of a method: its class, with its settings, is the method, and it names only what it has.

`Method.install` prepares an adapter before its training, and returns the `Work` that acts around the steps: an
optimizer, hooks, an end. A `RankMethod` moves ranks too: a `RankAllocator`, which knows no method by name, has its
`MethodRun` observe the run and decide at every adjustment. PE-DyRA and most rivals score triples and plan by the scores
(`scored.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.distributed import Average
from pedyra.allocate.schedule import Schedule
from pedyra.errors import UserError
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.replacement import NewTriples, Replacement


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
    initial_ranks: dict[str, int]
    """Layer -> rank that the run began with."""
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


BatchLoss = Callable[[nn.Module], Tensor]
"""A model's mean loss on one batch."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A method is told this of the training that is to come."""

    steps: Callable[[], int]
    """Counts its optimizer steps."""
    batches: Callable[[], Iterator[BatchLoss]]
    """Makes the losses of batches of its training rows, without end; the same from the start at every call."""
    losses: Callable[[float], tuple[Iterator[BatchLoss], Iterator[BatchLoss]]]
    """(part) -> losses of batches without end, of two sources of training rows that have no row in common; the second
    has this part of them. Raises ValueError: one of the two would have no row."""


class Work:
    """A method at work on one adapter acts by these around the steps of a training, which count from 0. Here they do
    nothing; a method that needs something else has a subclass."""

    ranks: RankMethod | None = None
    """A RankAllocator moves the ranks by it; None: they stay."""
    refused: Mapping[str, str] = {}
    """TrainingArguments that the method cannot train under -> why, and the repair."""
    resumable: bool = True
    """A training can go on from a checkpoint."""

    def make_optimizer(self, kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer | None:
        """Make the optimizer in the groups that the method needs; None: any optimizer over all that is trained.

        Args:
            arguments: of `kind`, lr among them.
        """

    def begin(self, total_steps: int, micro_batches: int) -> None:
        """Begin, before the first step or the first after a resume.

        Args:
            micro_batches: backward passes of a step, in all processes, whose losses are each divided by the whole
                step's count already; else 1.
        """

    def step_begins(self, step: int) -> None:
        """Act before the first forward pass of a step."""

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        """Act after the optimizer's step, with gradients still there. `skipped`: a GradScaler left the step out."""

    def end(self) -> None:
        """Make the adapter an ordinary one of PEFT again, after the last step; where a training breaks off by an
        exception it stays as it is."""


def acts(work: Work, name: str) -> bool:
    """Say whether a method has this function of `Work` for itself."""
    return getattr(type(work), name) is not getattr(Work, name)


class Method:
    """A method and its settings, before any training, as a user gives it: `Sora(l1=1.3)`. It has no state.

    A subclass is a frozen, keyword-only dataclass: its fields are the settings.
    """

    in_processes: ClassVar[bool] = True
    """Processes that see parts of a batch can share its training."""

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        """Give an adapter of `model` what the method trains, in place, before an optimizer is made; a second call
        changes nothing. Raises ValueError: the adapter is none that the method can begin with.

        Args:
            training: for a method that looks at the training before its first step (AutoLoRA, EVA, GoRA).
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values, for JSON: a run resumes with the same."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def at_budget(cls, rank: int) -> Beginning:
        """Say how a run begins that is to have the size of a LoRA of this rank, by the authors' convention. Raises
        ValueError: it cannot have it."""
        return Beginning(rank)


@dataclass(frozen=True)
class Beginning:
    """A run of a budget begins so."""

    r: int
    """Rank of each layer of the LoRA."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the method that the budget decides."""
    alpha: float = 1.0
    """lora_alpha, relative to that of the LoRA of the budget's rank."""


class RankMethod(Method):
    """A method that moves ranks, and its settings: `PeDyra(...)`."""

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

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        """Put triples into the adapter, see `attach`; A and B stay the Parameters that they are."""
        train_e(attach(model, adapter, self.start, self.seed), self.trains_e)
        return RankWork(self)

    def schedule(self, total_steps: int) -> Schedule:
        """Say when ranks are adjusted; ValueError where they never are."""
        raise NotImplementedError

    def check(self, run: Run, now: Situation) -> None:
        """Raise ValueError where it cannot do its work in this run, which begins at `now`; changes nothing."""

    def begin(self, run: Run) -> MethodRun:
        """Return the method in this run."""
        raise NotImplementedError


class RankWork(Work):
    """All that a method does around the steps is to move ranks."""

    def __init__(self, method: RankMethod) -> None:
        self.ranks = method


def method_of(config: object) -> Method:
    """Return what was given. Raises ValueError: it is no method, but a dict of settings, say, or the class itself."""
    if not isinstance(config, Method):
        name = config.__name__ if isinstance(config, type) and issubclass(config, Method) else "PeDyra"
        raise UserError(f"{config!r} is no method with its settings; give one, such as {name}()")
    return config
