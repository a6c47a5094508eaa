"""A method takes a `Request` and gives back an `Adaptation`; what methods share is here too, and knows no Trainer.

`pedyra.methods.in_trainer` runs an `Adaptation` in transformers' Trainer, and `benchmarks.loop` in a loop of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ValidationError
from torch import nn
from torch.optim import Optimizer
from transformers import set_seed

from pedyra.allocate.contract import RankMethod
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.errors import REFUSALS, UserError, telling
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer_names import pattern_keys
from pedyra.lora.spelling import did_you_mean
from pedyra.methods.data import Data
from pedyra.pe_dyra.config import RankSettings
from pedyra.pe_dyra.scored import ScoredMethod


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run asks this of a method."""

    method: str
    model: nn.Module
    """The base model, which the method wraps in place."""
    lora: LoraConfig
    """The LoRA that every method starts from."""
    rank: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RankSettings; a method that moves no ranks passes over them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that only this method has."""
    seed: int = 0
    """All that is drawn follows from it; the global seeds are set to it before an adapter is made."""
    steps: int = 1
    """Optimizer steps of the run."""
    data: Data | None = None
    """The training batches, for methods that look at them first (autolora)."""

    def with_lora(self, **changes: Any) -> PeftModel:
        """Give the base model the LoRA, some of its fields changed (e.g. r=12). Raises ValueError: PiSSA's start
        on a quantised model."""
        config = changed(self.lora, **changes)
        if str(config.init_lora_weights).startswith("pissa") and is_quantised(self.model):
            raise UserError(
                "the base model is quantised, but PiSSA decomposes the weight before it is quantised and rewrites it; "
                "set model.quantization to none, or use another lora.init (method pissa: method qlora)"
            )
        return self.with_adapter(config)

    def with_adapter(self, config: PeftConfig, base: nn.Module | None = None) -> PeftModel:
        """Give the base model the adapter of `config`, drawn with the seed, which the global seeds are set to."""
        config.revision = self.lora.revision
        set_seed(self.seed)
        with telling(f"method {self.method}: PEFT cannot adapt this model", *REFUSALS):
            model = get_peft_model(self.model if base is None else base, config)  # type: ignore[arg-type]
        assert isinstance(model, PeftModel)
        return model

    def refuse_lora(self, reason: str, *names: str) -> None:
        """Raise ValueError, with the reason, if one of these fields of the LoRA is not at its default."""
        for name in names:
            field = {"init": "init_lora_weights"}.get(name, name)
            value, default = getattr(self.lora, field), LoraConfig.__dataclass_fields__[field].default
            if value != default:
                raise UserError(
                    f"lora.{name} is {value!r}, but {reason}; leave it at {default!r} with method {self.method}"
                )

    def rank_settings(self, *, open_fields: Sequence[str] = (), **fixed: Any) -> RankSettings:
        """Return the settings of a rival that scores triples: `fixed` over the defaults; schedule and `open_fields` as
        given.

        An open field may be in `fixed` too, as the method's own default. Fields of `rank` that are neither have no
        part in the method and are passed over, as method lora does with all of them: recipes of a comparison share
        them.
        """
        free = {*SCHEDULE, "seed", *open_fields}
        return RankSettings(**{"seed": self.seed, **SCORED, **fixed, **self._given(free)})

    def ablation(self, kind: type[ScoredMethod], *open_fields: str, **own: Any) -> ScoredMethod:
        """Make PE-DyRA that plans in another way: it has the paper's settings, what `rank` gives of `SCORE_FIELDS` and
        of these, and its own fields."""
        given = self._given({*SCHEDULE, "seed", *SCORE_FIELDS, *open_fields})
        return kind(**{"seed": self.seed, **given}, **own)

    def _given(self, free: Collection[str]) -> dict[str, Any]:
        return {name: value for name, value in self.rank.items() if name in free}


def changed(lora: LoraConfig, **changes: Any) -> LoraConfig:
    """Copy the config with these fields changed."""
    config = copy.deepcopy(lora)
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


@dataclass(frozen=True, kw_only=True)
class Running:
    """The training that a method's hooks take part in."""

    total_steps: int
    allocator: RankAllocator | None = None
    """None where ranks stay as they are."""
    micro_batches: int = 1
    """Backward passes of a step, in all processes, whose losses are each divided by the whole step's count already."""


class Hooks:
    """A method acts by these around a step, beside moving ranks; here they do nothing. Steps count from 0."""

    def begin(self, run: Running) -> None:
        """Begin, before the first step or the first after a resume."""

    def step_begins(self, step: int) -> None:
        """Act before the first forward pass of a step."""

    def stepped(self, step: int, *, skipped: bool = False) -> None:
        """Act after the optimizer's step, with gradients still there. `skipped`: a GradScaler left the step out."""

    def end(self) -> None:
        """End after the last step, but not where training breaks off."""


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
    """The method that a RankAllocator moves the ranks by; None: they stay as they are."""
    optimizer: MakeOptimizer | None = None
    """None: any optimizer over all that is trained."""
    hooks: Hooks = Hooks()
    finish: Callable[[], None] | None = None
    """Changes `model` in place after training, e.g. truncates its ranks; None: nothing is to be done."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """TrainingArguments that the method cannot train under -> why, and the repair."""


class Settings(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """The settings that only one method has, `method_settings` in a recipe; true is no number here."""


@dataclass(frozen=True)
class Method:
    """A method, by the name that a recipe gives as `method`."""

    name: str
    summary: str
    """One line: what it does and where it comes from."""
    make: Callable[..., Adaptation]
    """(request), or (request, settings) of a method with settings of its own -> Adaptation."""
    settings: type[Settings] | None = None
    """Its own settings, where it has any."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the LoRA that it sets, whatever the run asks for."""
    quantization: str | None = None
    """The base model gets it where the run names none (qlora: nf4)."""
    resumable: bool = True
    """A run can continue from a checkpoint."""
    moves_ranks: bool = False
    """Ranks change in training, on the schedule of `rank`."""
    peft_type: str = "LORA"
    """The type of its adapter; only a LoRA can be fitted."""

    @property
    def setting_names(self) -> list[str]:
        """List the names of the method's own settings."""
        return [] if self.settings is None else list(self.settings.model_fields)

    def prepare(self, request: Request) -> Adaptation:
        """Give the base model its adapter. Raises ValueError: a setting that the method does not have, with the
        nearest, or what it cannot do; with the value, the rule and the repair."""
        known = self.setting_names
        for name in request.settings:
            if name not in known:
                hint = did_you_mean(name, known, otherwise=f"it has {', '.join(known) or 'none'}")
                raise UserError(f"method_settings.{name} is no setting of method {self.name}; {hint}")
        if self.lora:
            request = replace(request, lora=changed(request.lora, **self.lora))
        if self.settings is None:
            return self.make(request)
        try:
            settings = self.settings(**request.settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"method_settings.{first['loc'][0]} is {first['input']!r}: {first['msg']}") from None
        return self.make(request, settings)


# The adapter of a request.


def is_quantised(model: nn.Module) -> bool:
    """Say whether the frozen weights are in 4 or 8 bits, as transformers marks its models."""
    return bool(getattr(model, "is_quantized", False))


def with_ranks(lora: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None) -> LoraConfig:
    """Make a copy with a rank per layer (full name), and an alpha per layer where it is not `lora_alpha`."""
    keys = pattern_keys(ranks)
    patterns: dict[str, Any] = {"rank_pattern": {keys[name]: rank for name, rank in ranks.items()}}
    if alphas is not None:
        patterns["alpha_pattern"] = {keys[name]: alpha for name, alpha in alphas.items()}
    return changed(lora, **patterns)


def adaptive(model: PeftModel, method: RankMethod, **more: Any) -> Adaptation:
    """Make the Adaptation of a method that moves ranks, with its triples attached; `more` are further fields."""
    train_e(attach(model, start=method.start, seed=method.seed), method.trains_e)
    return Adaptation(model=model, ranks=method, **more)


# The settings of a request, checked against what the method has and what it fixes.

SCHEDULE = ("interval", "initial_warmup", "final_warmup")
"""Fields of the section `rank` that every method with a schedule takes from the recipe."""

SCORED: dict[str, Any] = dict(
    interval=0.05,
    initial_warmup=0.05,
    final_warmup=0.25,
    moves=None,
    budget="parameters",
    start="lora",
)
"""The rivals that score triples start from these, where they do not say otherwise: one schedule for all of them."""

SCORE_FIELDS = (
    *("alpha", "beta1", "beta2", "score_norm", "input_norm", "omega", "layer_score", "orth_form"),
    *("orth_weight", "start", "budget", "min_rank", "max_rank"),
)
"""An ablation of PE-DyRA shares these with it: all but what moves and how many."""
