"""RandLoRA (Albert et al. 2025) is PEFT's; here are its authors' scaling, and the r with a LoRA's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_count


@dataclass(frozen=True, kw_only=True)
class RandLora(Method):
    """RandLoRA (Albert et al. 2025): full-rank updates from random bases, of which only scalings are trained. PEFT's.

    It is scaled by alpha / (r sqrt n) with the n bases of a layer, and alpha = 2 r, as in the authors' code and README;
    PEFT's own scaling is sqrt n times larger. At the end the difference is folded into lambda, so that PEFT reads what
    was trained.
    """

    r: int | None = None
    """Rank of a basis. MORE means FEWER parameters. None: the one nearest to the parameters of the recipe's LoRA."""

    def __post_init__(self) -> None:
        if self.r is not None:
            check_count("r", self.r, 1)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        return AuthorsScaling([module for module in model.modules() if isinstance(module, RandLoraLayer)], adapter)


class AuthorsScaling(Work):
    """Layers are scaled by 2 / sqrt n while they train."""

    def __init__(self, layers: list[Any], adapter: str) -> None:
        self.adapter = adapter
        self.factors = {layer: 2 / layer.num_bases**0.5 / layer.scaling[adapter] for layer in layers}
        for layer, factor in self.factors.items():
            layer.scaling[adapter] *= factor

    @torch.no_grad()
    def end(self) -> None:
        for layer, factor in self.factors.items():
            layer.randlora_lambda[self.adapter].mul_(factor)
            layer.scaling[self.adapter] /= factor


def parameters_of(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Count the trainable parameters with bases of rank r on layers (in, out): n = ceil(min(in, out) / r) bases, with
    which the update has full rank, of r + min(in, out) scalings each."""
    return sum(math.ceil(min(shape) / r) * (r + min(shape)) for shape in shapes)


def nearest_r(shapes: list[tuple[int, int]], parameters: int) -> int:
    """Find the r whose count of parameters is nearest to this one; of two equally near that of the smaller count."""
    return min(
        range(1, max(min(shape) for shape in shapes) + 1),
        key=lambda r: (abs(parameters_of(r, shapes) - parameters), parameters_of(r, shapes)),
    )
