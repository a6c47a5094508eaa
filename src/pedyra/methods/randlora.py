"""RandLoRA (Albert et al. 2025): full-rank updates from random bases, of which only scalings are trained. PEFT's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import RandLoraConfig
from peft.tuners.randlora.layer import RandLoraLayer
from pydantic import Field

from pedyra.lora.layer import peft_layers
from pedyra.methods.method import Adaptation, Method, Request, Settings


class RandLoraSettings(Settings):
    """Settings of RandLoRA."""

    r: int | None = Field(None, ge=1)
    """Rank of a basis. MORE means FEWER parameters. None: the one nearest to the parameters of LoRA with lora.r."""


def prepare(request: Request, settings: RandLoraSettings) -> Adaptation:
    """Put RandLoRA on the LoRA's target modules, scaled by alpha / (r sqrt n) with the n bases of a layer, and alpha =
    2 r.

    So it is in the authors' code and README; PEFT's own scaling is sqrt n times larger. PEFT has one alpha for all
    layers, so that of the layers with the most bases carries their 1 / sqrt n. A layer with fewer trains at its own
    scaling, which `finish` folds into its lambda. PEFT's RandLoRA knows no excluded modules: with some, all others are
    named. Raises ValueError: a start, DoRA or rsLoRA, which RandLoRA does not have.
    """
    request.refuse_lora("PEFT's RandLoRA does not have it", "init", "use_dora", "use_rslora")
    lora = request.lora
    targets = _shapes(request)
    shapes = [*targets.values()]
    r = settings.r or nearest_r(shapes, lora.r * sum(map(sum, shapes)))
    most = max(bases_of(r, shape) for shape in shapes)
    config = RandLoraConfig(
        task_type=lora.task_type,
        r=r,
        randlora_alpha=2 * r / most**0.5,  # type: ignore[arg-type]
        randlora_dropout=lora.lora_dropout,
        target_modules="|".join(map(re.escape, targets)) if lora.exclude_modules else lora.target_modules,
        bias={"lora_only": "randlora_only"}.get(lora.bias, lora.bias),
        modules_to_save=lora.modules_to_save,
        projection_prng_key=request.seed,
    )
    model = request.with_adapter(config)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    factors = {layer: (most / layer.num_bases) ** 0.5 for layer in layers}
    for layer, factor in factors.items():
        layer.scaling["default"] *= factor

    @torch.no_grad()
    def finish() -> None:
        for layer, factor in factors.items():
            layer.randlora_lambda["default"].mul_(factor)
            layer.scaling["default"] /= factor

    return Adaptation(model=model, finish=finish)


def bases_of(r: int, shape: tuple[int, int]) -> int:
    """Return n = ceil(min(in, out) / r): with so many bases the update has full rank."""
    return math.ceil(min(shape) / r)


def parameters_of(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Count the trainable parameters with bases of rank r on layers (in, out): n bases of r + min(in, out) scalings
    each."""
    return sum(bases_of(r, shape) * (r + min(shape)) for shape in shapes)


def nearest_r(shapes: list[tuple[int, int]], parameters: int) -> int:
    """Find the r whose count of parameters is nearest to this one; of two equally near that of the smaller count."""
    return min(
        range(1, max(min(shape) for shape in shapes) + 1),
        key=lambda r: (abs(parameters_of(r, shapes) - parameters), parameters_of(r, shapes)),
    )


def _shapes(request: Request) -> dict[str, tuple[int, int]]:
    """Find the name and (in, out) of every target by wrapping it in LoRA for a moment."""
    model: Any = request.with_lora()
    layers = {layer.name: layer.module for layer in peft_layers(model, "default")}
    model.unload()
    return {name: (module.in_features, module.out_features) for name, module in layers.items()}


METHOD = Method(
    "randlora",
    "full-rank from scaled random bases (Albert et al. 2025)",
    prepare,
    RandLoraSettings,
    peft_type="RANDLORA",
)
