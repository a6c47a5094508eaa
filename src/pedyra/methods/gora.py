"""GoRA (He et al. 2025): ranks and B from the gradient of the frozen weights, before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from peft.utils.other import transpose
from torch import Tensor, nn

from pedyra.allocate.contract import Method, Training, Work
from pedyra.allocate.schedule import check_count, check_number
from pedyra.errors import UserError
from pedyra.methods.slots import OWN_START, Factors, gradients_of, linear_slots, refuse_lora, write_plain

BATCHES = 32
"""The gradient is the mean over these, the authors' number."""
LEAST, MOST = 0.5, 4
"""A layer's rank in parts of the LoRA's r: the authors' 4 to 32 at r = 8."""


@dataclass(frozen=True, kw_only=True)
class Gora(Method):
    """GoRA (He et al. 2025): ranks follow weight times gradient, and B begins where a step of full training would lead.

    G is the mean gradient of each frozen weight over 32 batches, which is held for all layers at once. A layer gets
    ranks in proportion to mean |W * G| over sqrt(in + out), at the budget sum r sqrt(in + out) of the LoRA that is
    given, but for rounding, and between a half of its r and four times it. A is drawn as PEFT does, and B is such that
    the update is -gamma sqrt(in / rank) times G, projected on the rows of A. It takes place again on a resume.

    Departs from the authors' code, and why: B has a minus, as in their paper, so that the loss falls; every layer keeps
    the scaling alpha / r of the LoRA, and B makes up for it, so the update at the start is theirs; dropout is off while
    G is measured. Raises ValueError: a frozen weight that has no gradient (quantised) or a coarse one (fp16); DoRA,
    rsLoRA or another start.
    """

    gamma: float = 0.05
    """Size of the update at the start, in steps of gradient descent; the authors'. 0: B = 0, and only ranks differ."""
    seed: int = 0
    """Seed of A."""

    in_processes = False

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)
        check_count("seed", self.seed, 0)

    def install(self, model: nn.Module, adapter: str = "default", training: Training | None = None) -> Work:
        refuse_lora(model, adapter, "GoRA", (*OWN_START, "use_dora"))
        if training is None:
            raise UserError("GoRA chooses ranks by the rows of a training, and has none; use pedyra.adapt")
        layers = linear_slots(model, adapter)
        weights = {layer.name: layer.module.get_base_layer().weight for layer in layers}
        for name, weight in weights.items():
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise UserError(
                    f"GoRA takes gradients of the frozen weights, and that of {name} is {weight.dtype}; load the model "
                    f"in float32 or bfloat16"
                )
        gradients = mean_gradients(model, weights, training)
        ranks = ranks_by_importance(
            {name: float((weight.detach() * gradients[name]).abs().mean()) for name, weight in weights.items()},
            {layer.name: math.sqrt(layer.a.in_features + layer.b.out_features) for layer in layers},
            {layer.name: layer.rank for layer in layers},
        )
        generator = torch.Generator().manual_seed(self.seed)
        factors = {}
        for layer in layers:
            width = layer.a.in_features
            A = (2 * torch.rand(ranks[layer.name], width, generator=generator) - 1) / math.sqrt(width)
            A = A.to(layer.a.A)
            G = transpose(gradients[layer.name], getattr(layer.module, "fan_in_fan_out", False)).to(A)
            step = self.gamma * math.sqrt(width / len(A)) / layer.scaling
            projection = torch.linalg.lstsq(A.float().T, G.float().T).solution.T.to(A)  # times A: G on the rows of A
            factors[layer] = Factors(A, -step * projection, layer.scaling)
        write_plain(model, adapter, factors)
        return Work()


def mean_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], training: Training
) -> dict[str, Float[Tensor, "out in"]]:
    """Average the gradient of these frozen weights, in float32, over the first batches of a training."""
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()]
    mode = model.training
    model.eval()
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in islice(training.batches(), BATCHES):
            for mean, gradient in zip(total, gradients_of(loss(model), [*weights.values()]), strict=True):
                mean += gradient.float() / BATCHES
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
        model.train(mode)
    return dict(zip(weights, total, strict=True))


def ranks_by_importance(
    importance: Mapping[str, float], sizes: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Share the budget sum r_i size_i out in proportion to the importance of the layers, within the bounds of each."""
    budget, total = sum(ranks[name] * sizes[name] for name in sizes), sum(importance.values())
    if not 0 < total < math.inf:
        raise UserError(f"the importance of all layers is {total}, so GoRA has no ranks; look for rows without labels")
    return {
        name: min(max(round(budget * importance[name] / total / sizes[name]), 1, round(LEAST * rank)), MOST * rank)
        for name, rank in ranks.items()
    }
