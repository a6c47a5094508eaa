"""The contract of a method: its class, with its settings, is the method, and it names only what it has.

`Method.install` prepares an adapter before its training, and returns the `Work` that acts around the steps. A method
that moves ranks is a `ScoredMethod` (`scored.py`), which a `RankAllocator` asks at every adjustment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from pedyra.allocate.distributed import Average
from pedyra.allocate.schedule import Schedule
from pedyra.errors import UserError
from pedyra.lora.layer import AdaptedLayer


@dataclass(frozen=True, kw_only=True)
class Run:
    """A method decides in this run, and knows this of it."""

    model: nn.Module
    layers: Sequence[AdaptedLayer]
    schedule: Schedule
    average: Average
    """Over the processes that see parts of a batch."""


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

    ranks: Any = None
    """A RankAllocator moves the ranks by this `ScoredMethod`; None: they stay."""
    refused: Mapping[str, str] = {}
    """TrainingArguments that the method cannot train under -> why, and the repair."""
    resumable: bool = True
    """A training can go on from a checkpoint."""

    def make_optimizer(self, kind: type[Optimizer], arguments: dict[str, Any], weight_decay: float) -> Optimizer | None:
        """Make the optimizer in the groups that the method needs, with these arguments of `kind`, lr among them; None:
        any optimizer over all that is trained."""

    def begin(self, total_steps: int, micro_batches: int) -> None:
        """Begin, before the first step or the first after a resume. `micro_batches`: backward passes of a step, in all
        processes, whose losses are each divided by the whole step's count already; else 1."""

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
    """A method and its settings, before any training, as a user gives it: `Sora(l1=1.3)`. It has no state: a subclass
    is a frozen, keyword-only dataclass, whose fields are the settings."""

    in_processes: ClassVar[bool] = True
    """Processes that see parts of a batch can share its training."""

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        """Give an adapter of `model` what the method trains, in place, before an optimizer is made; a second call
        changes nothing. `training`: for a method that looks at it before the first step (AutoLoRA, EVA, GoRA). Raises
        ValueError: the adapter is none that the method can begin with."""
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


def method_of(config: object) -> Method:
    """Return what was given. Raises ValueError: it is no method, but a dict of settings, say, or the class itself."""
    if not isinstance(config, Method):
        name = config.__name__ if isinstance(config, type) and issubclass(config, Method) else "PeDyra"
        raise UserError(f"{config!r} is no method with its settings; give one, such as {name}()")
    return config
