"""The training loop of the small benchmarks: a LoRA student of any ranks, Adam, and what happens in a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.attach import AdaptedLayer
from pedyra.lora.factors import AFactor
from pedyra.lora.fused import fuse

Loss = Callable[[nn.Module], Tensor]
"""A model's loss on one batch."""
Draw = Callable[[], Loss]
"""The loss on the next batch."""


def make_student(base: nn.Module, ranks: Mapping[str, int], scaling: float, seed: int) -> PeftModel:
    """A copy of `base` with a LoRA of these ranks (none where the rank is 0) and one scaling for all.

    Raises:
        ValueError: every rank is 0.
    """
    torch.manual_seed(seed)
    present = {name: rank for name, rank in ranks.items() if rank}
    if not present:
        raise ValueError("every layer has rank 0, so nothing can be trained; give some layer a rank")
    alphas: Any = {name: scaling * rank for name, rank in present.items()}
    config = LoraConfig(r=1, target_modules=list(present), rank_pattern=dict(present), alpha_pattern=alphas)
    model = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return model


def make_plain(adapted: Sequence[AdaptedLayer], fused: bool) -> None:
    """Attached layers train as plain LoRA: E stays 1. Slots that a method fills itself train as they are."""
    for layer in adapted:
        if not isinstance(layer.a, AFactor):
            continue
        layer.a.E.requires_grad_(False)
        if fused:
            fuse(layer.module)


def make_optimizer(
    adapted: Sequence[AdaptedLayer], lr: float, *, ratio: float = 1.0, gate_lr: float | None = None
) -> torch.optim.Adam:
    """Adam with a `peak` learning rate per group: lr for A, `ratio` times that for B and E.

    With `gate_lr`, E is a group of its own with this `constant` rate.
    """
    groups: list[dict[str, Any]] = [
        {"params": [layer.a.A for layer in adapted], "peak": lr},
        {"params": [layer.b.weight for layer in adapted], "peak": lr * ratio},
    ]
    gates = [layer.a.E for layer in adapted if layer.a.E.requires_grad]
    if gates and gate_lr is not None:
        groups.append({"params": gates, "constant": gate_lr})
    elif gates:
        groups[1]["params"] += gates
    return torch.optim.Adam(groups, lr=lr, fused=True)  # one call for all parameters: faster, also on a CPU


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Draw,
    factors: Sequence[float],
    *,
    clip: float | None = None,
    allocator: RankAllocator | None = None,
    after_step: Callable[[RankAllocator], None] | None = None,
) -> bool:
    """A step per factor on the peak learning rates; returns whether the loss became infinite or NaN.

    The gradient's norm is clipped to `clip` before the allocator reads it; `after_step` runs right after the
    optimizer's step.
    """
    for factor in factors:
        value = draw()(model)
        if not value.isfinite():
            return True
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        for group in optimizer.param_groups:
            group["lr"] = group["constant"] if "constant" in group else group["peak"] * factor
        if allocator is not None:
            allocator.before_step()
        optimizer.step()
        if allocator is not None and after_step is not None:
            after_step(allocator)
        optimizer.zero_grad()
        if allocator is not None:
            allocator.after_step()
    return False
