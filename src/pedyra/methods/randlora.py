"""RandLoRA (Albert et al. 2025): full-rank updates from random bases, of which only scalings are trained. PEFT's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import RandLoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from pedyra.methods.adapter import with_adapter, with_lora
from pedyra.methods.method import Adaptation
from pedyra.methods.settings import method_settings, refuse_lora, require
from pedyra.models import lora_config
from pedyra.recipe import Recipe
from pedyra.tasks import Task


@dataclass(frozen=True, kw_only=True)
class RandLoraSettings:
    """Settings of RandLoRA."""

    r: int | None = None
    """Rank of a basis. MORE means FEWER parameters. None: the one nearest to the parameters of LoRA with lora.r."""
    alpha: float | None = None
    """Scaling is alpha / r. None: 20 r, PEFT's advice; a smaller one allows a higher learning rate."""
    sparse: bool = False
    """Ternary bases."""

    def __post_init__(self) -> None:
        require(self.r is None or self.r >= 1, f"method_settings.r is {self.r}; the rank of a basis is at least 1")


def prepare(base_model: PreTrainedModel, recipe: Recipe, task: Task, *, record_to: Path | None = None) -> Adaptation:
    """RandLoRA on the recipe's target modules.

    Raises:
        ValueError: a rank per layer, or a start, DoRA or rsLoRA, which RandLoRA does not have.
    """
    if "rank_pattern" in recipe.method_settings:
        raise ValueError(
            "method_settings.rank_pattern: RandLoRA shares its random bases over all layers, so there is one r for "
            "all; remove it, or use method lora"
        )
    settings = method_settings(recipe, RandLoraSettings)
    refuse_lora(recipe, "PEFT's RandLoRA does not have it", "init", "use_dora", "use_rslora", "exclude_modules")
    r = settings.r or nearest_r(*_shapes_and_lora_parameters(base_model, recipe))
    lora = lora_config(recipe.lora, recipe.data.kind)
    config = RandLoraConfig(
        task_type=lora.task_type,
        r=r,
        randlora_alpha=20 * r if settings.alpha is None else settings.alpha,  # type: ignore[arg-type]
        randlora_dropout=recipe.lora.dropout,
        target_modules=lora.target_modules,
        bias={"lora_only": "randlora_only"}.get(recipe.lora.bias, recipe.lora.bias),
        modules_to_save=lora.modules_to_save,
        sparse=settings.sparse,
        projection_prng_key=recipe.seed,
    )
    return Adaptation(model=with_adapter(base_model, config, recipe.seed))


def parameters_of(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Trainable parameters with bases of rank r on layers (in, out): n bases of r + min(in, out) scalings each."""
    return sum(math.ceil(min(shape) / r) * (r + min(shape)) for shape in shapes)


def nearest_r(shapes: list[tuple[int, int]], parameters: int) -> int:
    """The r whose count of parameters is nearest to this one; the smaller count of two equally near."""
    return min(
        range(1, max(min(shape) for shape in shapes) + 1),
        key=lambda r: (abs(parameters_of(r, shapes) - parameters), parameters_of(r, shapes)),
    )


def _shapes_and_lora_parameters(base_model: PreTrainedModel, recipe: Recipe) -> tuple[list[tuple[int, int]], int]:
    """(in, out) of every target, found by wrapping it in LoRA for a moment, and LoRA's parameters there."""
    model: Any = with_lora(base_model, recipe)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    model.unload()
    return shapes, sum(recipe.lora.r * (n_in + n_out) for n_in, n_out in shapes)
