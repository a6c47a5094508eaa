"""What a method is given, what it gives back, and what it may do around a training step. It knows no Trainer.

`pedyra.methods.loop` runs an `Adaptation` in a loop of one's own, `pedyra.methods.trainer` in transformers' Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from torch.optim import Optimizer

from pedyra.allocate.contract import RankMethod
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.spelling import did_you_mean
from pedyra.methods.data import Data


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run asks of a method."""

    method: str
    """Its name."""
    model: nn.Module
    """The base model, which the method wraps in place."""
    lora: LoraConfig
    """The LoRA that every method starts from."""
    rank: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RankSettings; a method that moves no ranks passes over them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What only this method has."""
    seed: int = 0
    """Of all that is drawn; the global seeds are set to it before an adapter is made."""
    steps: int = 1
    """Optimizer steps of the run."""
    data: Data | None = None
    """The training batches, for methods that look at them first (eva, gora, autolora)."""


def changed(lora: LoraConfig, **changes: Any) -> LoraConfig:
    """A copy of the config with these fields changed."""
    config = copy.deepcopy(lora)
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


@dataclass(frozen=True, kw_only=True)
class Running:
    """The training that a method's hooks take part in."""

    total_steps: int
    optimizer: Optimizer
    allocator: RankAllocator | None = None
    """What moves the ranks, where they move."""
    micro_batches: int = 1
    """Backward passes of a step whose losses are each divided by the whole step's count already."""


class Hooks:
    """What a method does around a step, beside moving ranks; these do nothing. Steps count from 0."""

    def begin(self, run: Running) -> None:
        """Before the first step, or the first after a resume."""

    def step_begins(self, step: int) -> None:
        """Before the first forward pass of a step."""

    def gradients_complete(self) -> None:
        """Gradients are accumulated, unscaled and clipped; the optimizer has not stepped yet."""

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        """The optimizer has stepped and gradients are still there. `skipped`: a GradScaler left the step out."""

    def end(self) -> None:
        """After the last step, or where training breaks off."""


MakeOptimizer = Callable[[type[Optimizer], dict[str, Any], float], Optimizer]
"""(class, its arguments with lr among them, weight decay) -> the optimizer, with the groups that a method needs."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A model with its adapter, and what has to happen around its training.

    Whoever trains makes the optimizer by `optimizer` where there is one, moves ranks by `ranks`, calls the hooks, and
    calls `finish` after training and before evaluating and saving. `model.save_pretrained` then writes an adapter that
    PEFT loads by itself.
    """

    model: PeftModel
    ranks: RankMethod | None = None
    """What moves the ranks, for a RankAllocator or RankCallback; None: they stay as they are."""
    optimizer: MakeOptimizer | None = None
    """None: any optimizer over all that is trained."""
    hooks: Hooks = Hooks()
    finish: Callable[[], None] | None = None
    """Changes `model` in place after training, e.g. truncates its ranks; None: nothing is to be done."""
    spent: Mapping[str, float] = field(default_factory=dict)
    """What was done before the run, for its log: name -> number."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """TrainingArguments that the method cannot train under -> why, and the repair."""


@dataclass(frozen=True)
class Method:
    """One row of a comparison, by the name a recipe gives as `method`."""

    name: str
    summary: str
    """One line: what it does and where it comes from."""
    make: Callable[..., Adaptation]
    """(request), or (request, settings) of a method with settings of its own -> Adaptation."""
    settings: type[Any] | None = None
    """The dataclass of its own settings, `method_settings` in a recipe."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the LoRA that it sets, whatever the run asks for."""
    quantization: str | None = None
    """Of the base model, where the run names none (qlora: nf4)."""
    resumable: bool = True
    """Whether a run can continue from a checkpoint."""
    moves_ranks: bool = False
    """Whether ranks change in training, on the schedule of `rank`."""
    takes_ranks: bool = False
    """Whether it keeps the ranks that `lora.ranks` gives the layers; others choose ranks themselves, or share them."""

    @property
    def setting_names(self) -> list[str]:
        """Names of the method's own settings."""
        return [] if self.settings is None else [each.name for each in fields(self.settings)]

    def prepare(self, request: Request) -> Adaptation:
        """Give the base model its adapter.

        Raises:
            ValueError: a setting that the method does not have, with the nearest, or what it cannot do; with the
                value, the rule and the repair.
        """
        known = self.setting_names
        for name in request.settings:
            if name not in known:
                hint = did_you_mean(name, known, otherwise=f"it has {', '.join(known) or 'none'}")
                raise ValueError(f"method_settings.{name} is no setting of method {self.name}; {hint}")
        if self.lora:
            request = replace(request, lora=changed(request.lora, **self.lora))
        return self.make(request) if self.settings is None else self.make(request, self.settings(**request.settings))

    def nearest_settings(self, request: Request, parameters: int) -> list[dict[str, Any]]:
        """Settings, the nearest first, with which it trains about so many parameters; none where lora.r decides that.

        A method whose own settings decide has `nearest(request, parameters)` among them, as RandLoRA does.
        """
        nearest = getattr(self.settings, "nearest", None)
        return [] if nearest is None else nearest(request, parameters)
