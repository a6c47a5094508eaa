"""One run of one contender: a base module, its LoRA student, Adam with a linear decay, and the ranks at the end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pedyra.adapters.attach import AdaptedLayer, attach
from pedyra.adapters.factors import AFactor
from pedyra.adapters.fused import fuse
from pedyra.config import RankConfig
from pedyra.experiments.contenders import Contender
from pedyra.training.rank_allocator import RankAllocator


@dataclass(frozen=True)
class Trial:
    """How a run ended."""

    model: PeftModel
    ranks: dict[str, int]
    """Of every layer that could be adapted, in the order given."""
    parameters: int
    """Of the ranks at the end, as they are on disk (A and B)."""
    diverged: bool
    """The loss was not finite at some step, and the run stopped there."""
    adjustments: int
    """Adjustments that moved a triple."""
    seconds: float


def run_trial(
    base: nn.Module,
    layers: Sequence[str],
    contender: Contender,
    loss: Callable[[nn.Module], Tensor],
    *,
    rank: int,
    lr: float,
    steps: int,
    seed: int,
    scaling: float = 1.0,
    warmup: int = 0,
    clip: float | None = None,
    fused: bool = False,
) -> Trial:
    """Adapt `layers` of `base` (nn.Linear, by name) for `steps` steps, at the budget of a uniform `rank`.

    Args:
        loss: draws the next batch and returns its loss; called once a step.
        lr: the peak; it rises linearly for `warmup` steps and falls linearly to zero at the last.
        scaling: alpha / r, the same for every rank.
        clip: largest norm of the gradient; None: any.
        fused: `RankConfig.fused`, also for fixed ranks; worth it from about a thousand tokens a step.

    Raises:
        ValueError: a budget or schedule that the contender cannot meet, a layer name it does not find.
    """
    began = time.perf_counter()
    costs = layer_costs(base, layers)
    config = _config(contender, rank * len(layers), seed)
    gradients = _gradients(base, layers, loss, contender.look) if contender.look else {}
    gains = {name: _gains(*halves) for name, halves in gradients.items()}
    if contender.pattern is not None:
        ranks = contender.pattern(costs, rank, gains)
    else:
        ranks = dict.fromkeys(layers, contender.first_rank(rank))
    model = make_student(base, ranks, scaling * contender.scale(rank), seed)
    adapted = attach(model, start=config.start if config else "lora", seed=seed)
    if gradients:
        _start_along(adapted, gradients)
    if contender.start is not None:
        contender.start(adapted, seed)
    fused = fused and all(type(layer.a) is AFactor for layer in adapted)
    if config is None:
        for layer in adapted:
            layer.a.E.requires_grad_(False)  # plain LoRA
            if fused:
                fuse(layer.module)
    optimizer = _optimizer(adapted, contender, lr)
    allocator = None
    if config is not None:
        rule = contender.rule(rank, seed)
        allocator = RankAllocator(model, optimizer, replace(config, fused=fused), steps, policy=rule)
    factors = [min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps) for step in range(contender.look, steps)]
    diverged = _train(model, optimizer, allocator, contender, loss, factors, clip)
    ranks = {name: 0 for name in layers} | (allocator.ranks if allocator else {n: r for n, r in ranks.items() if r})
    return Trial(
        model=model,
        ranks=ranks,
        parameters=sum(costs[name] * r for name, r in ranks.items()),
        diverged=diverged,
        adjustments=sum(bool(record["pruned"] or record["added"]) for record in allocator.history) if allocator else 0,
        seconds=time.perf_counter() - began,
    )


def layer_costs(base: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Layer name -> in + out, the parameters of one rank on disk."""
    return {name: sum(base.get_submodule(name).weight.shape) for name in layers}  # type: ignore[misc, union-attr]


def make_student(base: nn.Module, ranks: Mapping[str, int], scaling: float, seed: int) -> PeftModel:
    """A copy of `base` with a LoRA of these ranks (none where the rank is 0) and one scaling for all."""
    torch.manual_seed(seed)
    present = {name: rank for name, rank in ranks.items() if rank}
    if not present:
        raise ValueError("every layer has rank 0, so nothing can be trained; give some layer a rank")
    alphas: Any = {name: scaling * rank for name, rank in present.items()}
    config = LoraConfig(r=1, target_modules=list(present), rank_pattern=dict(present), alpha_pattern=alphas)
    model = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return model


def _config(contender: Contender, total_rank: int, seed: int) -> RankConfig | None:
    if contender.config is None:
        return None
    config = replace(contender.config, seed=seed)
    if config.moves is None and contender.moves is not None:
        config = replace(config, moves=max(1, round(contender.moves * total_rank)))
    return config


def _optimizer(adapted: Sequence[AdaptedLayer], contender: Contender, lr: float) -> torch.optim.Adam:
    groups: list[dict[str, Any]] = [
        {"params": [layer.a.A for layer in adapted], "peak": lr},
        {"params": [layer.b.weight for layer in adapted], "peak": lr * contender.ratio},
    ]
    gates = [layer.a.E for layer in adapted if layer.a.E.requires_grad]
    if gates and contender.gate_lr is not None:
        groups.append({"params": gates, "constant": contender.gate_lr})
    elif gates:
        groups[1]["params"] += gates
    return torch.optim.Adam(groups, lr=lr, fused=True)  # one call for all parameters: faster, also on a CPU


def _train(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    allocator: RankAllocator | None,
    contender: Contender,
    loss: Callable[[nn.Module], Tensor],
    factors: Sequence[float],
    clip: float | None,
) -> bool:
    """A step per factor on the learning rates; returns whether the loss became infinite or NaN."""
    for factor in factors:
        value = loss(model)
        if not value.isfinite():
            return True
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        for group in optimizer.param_groups:
            group["lr"] = group["constant"] if "constant" in group else group["peak"] * factor
        if allocator is not None:
            allocator.before_step()
            if contender.before_step is not None:
                contender.before_step(allocator)
        optimizer.step()
        if allocator is not None and contender.after_step is not None:
            contender.after_step(allocator)
        optimizer.zero_grad()
        if allocator is not None:
            allocator.after_step()
    return False


def _gradients(
    base: nn.Module, layers: Sequence[str], loss: Callable[[nn.Module], Tensor], steps: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The dense gradient of every layer, `(out, in)`: the mean over the first and over the second half of `steps`."""
    model = copy.deepcopy(base).requires_grad_(False)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight.requires_grad_() for name in layers}
    halves = []
    for count in (steps - steps // 2, steps // 2):
        for _ in range(count):
            loss(model).backward()
        halves.append([weight.grad / count for weight in weights.values()])
        model.zero_grad()
    return dict(zip(layers, zip(*halves, strict=True), strict=True))


def _gains(first: Tensor, second: Tensor) -> list[float]:
    """u^T G v of the first half's singular pairs along the second half's gradient, which did not choose them."""
    left, _, right = torch.linalg.svd(first, full_matrices=False)
    gains = torch.einsum("or,oi,ri->r", left, second, right)
    return gains.sort(descending=True).values.tolist()


@torch.no_grad()
def _start_along(adapted: Sequence[AdaptedLayer], gradients: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """A's rows become the top right singular vectors of the whole gradient, as long as the rows were; B stays 0."""
    for layer in adapted:
        first, second = gradients[layer.name]
        right = torch.linalg.svd(first + second, full_matrices=False).Vh[: layer.rank]
        layer.a.A.copy_(right * layer.a.A.norm(dim=1).mean())
