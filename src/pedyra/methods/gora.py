"""GoRA (He et al. 2025): ranks and the start of B from the gradient of the frozen weights, then plain LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import set_seed

from pedyra.lora.attach import check_supported
from pedyra.lora.layer import lora_layers, rank_parameters
from pedyra.methods.data import Data
from pedyra.methods.method import Adaptation, Method, Request, Settings, is_quantised, require, setting, with_ranks

# Of the authors' scripts.
STEPS = 32
"""n: batches whose gradient is averaged."""
ETA = 5e-2
"""eta_0: the start is about one step of this size down the gradient, within the span of A."""
MEMORY = 256 << 20
"""Bytes of dense gradients held at a time; more layers than fit are done one group after another, each over all
batches."""


@dataclass(frozen=True, kw_only=True)
class GoraSettings(Settings):
    """Settings of GoRA; the defaults are those of the authors' scripts, relative to lora.r where theirs is 8."""

    min_rank: int | None = setting(None, least=1)
    """None: half of lora.r, at least 1."""
    max_rank: int | None = setting(None, least=1)
    """None: 4 lora.r."""


def ranks_of(
    importance: Mapping[str, float], widths: Mapping[str, int], *, r: int, min_rank: int, max_rank: int
) -> dict[str, int]:
    """r_l = clamp(round(budget I_l) // (in + out)) with the budget of parameters of a uniform r, and sum I_l = 1."""
    budget = r * sum(widths.values())
    total = sum(importance.values())
    shares = {name: value / total if total > 0 else 1 / len(importance) for name, value in importance.items()}
    return {name: min(max(round(budget * share) // widths[name], min_rank), max_rank) for name, share in shares.items()}


def start_of_b(gradient_of_A: Tensor, A: Tensor, *, eta: float, scaling: float) -> Tensor:
    """B_0 `(out, r)` with s B_0 A = -eta sqrt(in / r) P(G), P the projection on the rows of A.

    Args:
        gradient_of_A: G A^T `(out, r)`, all that is needed of the gradient.
    """
    r, width = A.shape
    gram = A @ A.T + 1e-8 * torch.eye(r, dtype=A.dtype, device=A.device)
    return -eta * (width / r) ** 0.5 / scaling * torch.linalg.solve(gram, gradient_of_A.T).T


def prepare(request: Request, settings: GoraSettings) -> Adaptation:
    """LoRA with a rank per layer, its B one step down the averaged gradient, and scaling alpha / sqrt(rank).

    Importance is mean |W * G| of a layer, G the gradient of its frozen weight averaged over 32 batches. The
    parameters are those of lora.r but for rounding down and the clamps, so about, not exactly, the budget: the count
    is reported. LoRA+ and the cosine schedule of the authors' scripts are settings of the recipe, not of the method.

    Departs from the authors' code, and why: B starts against the gradient (the sign is missing in theirs, though its
    own error measure compares with -eta G); of a layer's gradient only mean |W * G| and G A^T are kept, where theirs
    holds all layers' on the CPU. Raises ValueError: a quantised model, whose weights have no gradient; DoRA, rsLoRA, or
    another start.
    """
    request.refuse_lora("GoRA defines its own start and scaling", "init", "use_rslora", "use_dora")
    if is_quantised(request.model):
        raise ValueError(
            "the base model is quantised, but GoRA needs the gradient of the weights, which quantised ones do not "
            "have; set model.quantization to none, or use method eva"
        )
    r = request.lora.r
    min_rank = max(1, r // 2) if settings.min_rank is None else settings.min_rank
    max_rank = 4 * r if settings.max_rank is None else settings.max_rank
    require(
        min_rank <= r <= max_rank,
        f"method_settings.min_rank {min_rank} and max_rank {max_rank} must enclose lora.r {r}",
    )
    probe = request.with_lora(r=max_rank)
    check_supported(probe.peft_config["default"], list(lora_layers(probe, "default")))
    assert request.data is not None
    observed = observe(probe, request.data, request.seed)
    base_model: Any = probe.unload()  # type: ignore[operator]
    importance = {name: layer.importance for name, layer in observed.items()}
    widths = {name: rank_parameters(layer.A.shape[1], len(layer.gradient_of_A)) for name, layer in observed.items()}
    ranks = ranks_of(importance, widths, r=r, min_rank=min_rank, max_rank=max_rank)
    # alpha / sqrt(r) by hand: PEFT's use_rslora ignores what a pattern says.
    config = with_ranks(
        request.lora, ranks, {name: request.lora.lora_alpha * rank**0.5 for name, rank in ranks.items()}
    )
    model = request.with_adapter(config, base_model)
    with torch.no_grad():
        for name, layer in _layers(model):
            seen, rank = observed[name], ranks[name]
            A = seen.A[:rank]
            layer.lora_A["default"].weight.copy_(A)
            B = start_of_b(seen.gradient_of_A[:, :rank], A, eta=ETA, scaling=layer.scaling["default"])
            layer.lora_B["default"].weight.copy_(B)
    return Adaptation(model=model)


@dataclass(frozen=True)
class Observed:
    """What is kept of a layer's averaged gradient G."""

    importance: float
    A: Tensor
    """The rows G was projected on, `(max_rank, in)`; a layer of rank r starts with the first r."""
    gradient_of_A: Tensor
    """G A^T, `(out, max_rank)`."""


def observe(
    model: PeftModel, data: Data, seed: int, *, steps: int = STEPS, memory: int = MEMORY
) -> dict[str, Observed]:
    """The averaged gradient of every target weight, as little of it as is needed; no weight is changed. A batch whose
    loss is not finite is left out; ValueError where all are."""
    observed: dict[str, Observed] = {}
    model.train()
    for group in _groups(_layers(model), memory):
        weights = {name: layer.get_base_layer().weight for name, layer in group}
        for weight in weights.values():
            weight.requires_grad_(True)
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        set_seed(seed)  # every group sees the same batches and the same dropout
        count = 0
        for batch in islice(data.batches(), steps):
            loss = data.loss(model, batch)
            if not loss.isfinite():
                continue
            count += 1
            # Zeros for a layer that takes no part in the loss, which then gets the lowest rank.
            parts = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            for name, part in zip(weights, parts, strict=True):
                sums[name] += part
        if not count:
            raise ValueError(
                f"none of {steps} batches has a finite loss, so GoRA has no gradient to begin with; look for rows "
                f"without labels, or load the model in float32"
            )
        for name, layer in group:
            weight, A = weights[name].requires_grad_(False), layer.lora_A["default"].weight.detach().clone()
            gradient = sums[name] / count
            importance = float((weight.float() * gradient).abs().mean())
            observed[name] = Observed(importance, A, transpose(gradient, layer.fan_in_fan_out) @ A.float().T)
    return observed


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(layer.name, layer.module) for layer in lora_layers(model, "default")]


def _groups(layers: list[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    """Consecutive layers whose gradients fit into `limit` bytes together; a larger one is alone."""
    group: list[tuple[str, Any]] = []
    size = 0
    for name, layer in layers:
        bytes_needed = 4 * layer.get_base_layer().weight.numel()
        if group and size + bytes_needed > limit:
            yield group
            group, size = [], 0
        group.append((name, layer))
        size += bytes_needed
    yield group


METHOD = Method("gora", "LoRA with ranks and start from the gradient (He et al. 2025)", prepare, GoraSettings)
