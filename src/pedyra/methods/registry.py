"""A base model gets the adapter of a method by its name: what a recipe, a comparison and the benchmarks ask for.

LoRA, PiSSA, DoRA, QLoRA and RandLoRA are configs of PEFT, and are never rewritten.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, RandLoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from pedyra.allocate.contract import Beginning, Method
from pedyra.allocate.scored import ScoredMethod
from pedyra.errors import REFUSALS, UserError, as_user_error
from pedyra.lora.attach import attach, train_e
from pedyra.lora.layer import peft_layers
from pedyra.lora.start import takes_from_weight
from pedyra.methods.adalora import ON_PEFT, AdaLora
from pedyra.methods.names import NAMES, check_method, class_of, make_method
from pedyra.methods.randlora import RandLora, nearest_r
from pedyra.methods.sizes import check_shrinks, final_rank


@dataclass(frozen=True)
class Entry:
    """A method stands under its name in the table of all."""

    name: str
    own_summary: str = ""
    """One line, where PEFT's config is all of the method; else it is the first of its class."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the LoRA that it sets, whatever the run asks for."""
    quantization: str | None = None
    """The base model gets it where the run names none (qlora: nf4)."""
    resumable: bool = True
    """A run can continue from a checkpoint."""
    peft_type: str = "LORA"
    """The type of its adapter; only a LoRA can be fitted."""

    @property
    def summary(self) -> str:
        """Say in a line what it does and where it comes from."""
        return self.own_summary or (class_of(self.name).__doc__ or "").splitlines()[0]

    @property
    def moves_ranks(self) -> bool:
        """Tell whether ranks change in training, on a schedule."""
        kind = class_of(self.name)
        return kind is not None and issubclass(kind, ScoredMethod)

    def at_budget(self, rank: int) -> Beginning:
        """Say how it begins a run that is to have the size of a LoRA of this rank; see `Method.at_budget`."""
        kind = class_of(self.name)
        return Beginning(rank) if kind is None else kind.at_budget(rank)

    def begin(
        self, base: nn.Module, lora: LoraConfig, settings: Mapping[str, Any], seed: int = 0
    ) -> tuple[PeftModel, Method | None]:
        """Give the base model the adapter, drawn with the seed, which the global seeds are set to; and return the
        method that is to be installed, None where PEFT's config is all of it.

        A start that takes from the weight (PiSSA, OLoRA) is attached, with E frozen at 1. It trains exactly as PEFT
        does, and what is saved is an ordinary LoRA against the pristine weight, of rank 2r, because a random SVD
        (pissa_niter_4) does not come out twice. Raises ValueError for a setting, or a model, that it does not take.
        """
        method = make_method(self.name, settings, seed)
        lora, quantised = changed(lora, **self.lora), getattr(base, "is_quantized", False)
        if self.name == "pissa" and not str(lora.init_lora_weights).startswith("pissa"):
            if lora.init_lora_weights is not True:
                raise UserError(
                    f"lora.init is {lora.init_lora_weights!r}, but method pissa is a start of its own; give pissa or "
                    f"pissa_niter_16"
                )
            lora = changed(lora, init_lora_weights="pissa")
        if self.name == "qlora" and not quantised:
            raise UserError("method qlora needs a quantised model; set model.quantization to nf4 or int8")
        if str(lora.init_lora_weights).startswith("pissa") and quantised:
            raise UserError(
                "the base model is quantised, but PiSSA decomposes the weight before it is quantised and rewrites it; "
                "set model.quantization to none, or use another lora.init (method pissa: method qlora)"
            )
        config: PeftConfig = lora
        if self.name == "adalora":
            config = _adalora(lora, method)
            method = AdaLora(**{name: getattr(method, name) for name in ON_PEFT})
        elif self.name == "randlora":
            config = _randlora(base, lora, method, seed)
        set_seed(seed)
        with as_user_error(f"method {self.name}: PEFT cannot adapt this model", *REFUSALS):
            model = get_peft_model(base, config)  # type: ignore[arg-type]
        assert isinstance(model, PeftModel)
        if (method is None or self.name == "lora+") and takes_from_weight(lora.init_lora_weights):
            train_e(attach(model), False)
        return model, method


def changed(lora: LoraConfig, **changes: Any) -> LoraConfig:
    """Copy the config with these fields changed."""
    config = copy.deepcopy(lora)
    for name, value in changes.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def _refuse(lora: LoraConfig, who: str) -> None:
    for name, key in (("use_dora", "use_dora"), ("use_rslora", "use_rslora"), ("init_lora_weights", "init")):
        value, default = getattr(lora, name), LoraConfig.__dataclass_fields__[name].default
        if value != default:
            raise UserError(f"lora.{key} is {value!r}, but PEFT's {who} does not have it; leave it at {default!r}")


def _adalora(lora: LoraConfig, method: AdaLora) -> AdaLoraConfig:
    _refuse(lora, "AdaLoRA")
    check_shrinks(method.final_rank, [lora.r])
    return AdaLoraConfig(
        revision=lora.revision,
        task_type=lora.task_type,
        init_r=lora.r,
        target_r=final_rank(method.final_rank, [lora.r]),
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.orth_weight,
        total_step=1,  # until the run begins
    )


def _randlora(base: nn.Module, lora: LoraConfig, method: RandLora, seed: int) -> RandLoraConfig:
    """Put RandLoRA on the LoRA's target modules. PEFT's RandLoRA knows no excluded modules: with some, all others are
    named."""
    _refuse(lora, "RandLoRA")
    wrapped: Any = get_peft_model(base, copy.deepcopy(lora))  # type: ignore[arg-type]
    layers = {layer.name: layer.module for layer in peft_layers(wrapped, "default")}
    wrapped.unload()
    shapes = [(module.in_features, module.out_features) for module in layers.values()]
    r = method.r or nearest_r(shapes, lora.r * sum(map(sum, shapes)))
    return RandLoraConfig(
        revision=lora.revision,
        task_type=lora.task_type,
        r=r,
        randlora_alpha=2 * r,
        randlora_dropout=lora.lora_dropout,
        target_modules="|".join(map(re.escape, layers)) if lora.exclude_modules else lora.target_modules,
        bias={"lora_only": "randlora_only"}.get(lora.bias, lora.bias),
        modules_to_save=lora.modules_to_save,
        projection_prng_key=seed,
    )


_ENTRIES = (
    Entry("lora", "LoRA (Hu et al. 2021)"),
    Entry("pissa", "LoRA from the weight's top triples (Meng et al. 2024)"),
    Entry("dora", "LoRA of a direction, and its magnitude (Liu et al. 2024)", lora={"use_dora": True}),
    Entry("qlora", "LoRA over weights in 4 bits (Dettmers et al. 2023)", quantization="nf4"),
    Entry("randlora", peft_type="RANDLORA"),
    Entry("adalora", "AdaLoRA (Zhang et al. 2023), PEFT's own: masked ranks", resumable=False, peft_type="ADALORA"),
)
METHODS = {name: Entry(name) for name in NAMES} | {entry.name: entry for entry in _ENTRIES}


def get_method(name: str) -> Entry:
    """Return the method of this name. Raises ValueError: there is none; the message names the nearest."""
    check_method(name)
    return METHODS[name]
