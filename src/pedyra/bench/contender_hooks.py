"""What some methods do beside their rule, for a loop without a Trainer: their starts and the work of their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.attach import AdaptedLayer, detach
from pedyra.methods import dylora, para, sora
from pedyra.methods.increlora import RESERVE_E
from pedyra.methods.l1ra import L1raSettings, shrink_gates
from pedyra.methods.triadaptlora import STD, CoreFactor, gaussian_core


@torch.no_grad()
def start_gated(model: PeftModel, layers: Sequence[AdaptedLayer], seed: int) -> None:
    """L1RA: A ~ N(0, 1 / r^2)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.a.A.copy_(torch.randn(layer.a.A.shape, generator=generator) / layer.rank)


def close_gates(allocator: RankAllocator, *, settings: L1raSettings) -> None:
    """L1RA: the L1 step of every gate."""
    with torch.no_grad():
        for layer in allocator.layers:
            shrink_gates(layer.a.E, settings.gate_learning_rate, settings.l1)


def reserve(rank: int) -> int:
    """IncreLoRA: ranks that a layer holds in reserve."""
    return max(1, rank // 2)


@torch.no_grad()
def start_reserve(model: PeftModel, layers: Sequence[AdaptedLayer], seed: int) -> None:
    """IncreLoRA: all but the first triple are the reserve."""
    for layer in layers:
        layer.a.E[1:] = RESERVE_E


def start_core(model: PeftModel, layers: Sequence[AdaptedLayer], seed: int) -> None:
    """TriAdaptLoRA: a 1 x 1 core; A and the core ~ N(0, 0.02^2)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        A = nn.Parameter(torch.randn(layer.a.A.shape, generator=generator) * STD)
        layer.module.lora_A[layer.adapter] = CoreFactor(A, nn.Parameter(gaussian_core(0, 1, generator)))


def slot_adam(layers: Sequence[AdaptedLayer], lr: float) -> torch.optim.Adam:
    """Adam over all that the slots hold, at one `peak` rate."""
    slots = [slot for layer in layers for slot in (layer.a, layer.b)]
    return torch.optim.Adam([{"params": [p for slot in slots for p in slot.parameters()], "peak": lr}], fused=True)


def start_soft_gates(model: PeftModel, layers: Sequence[AdaptedLayer], seed: int) -> None:
    """SoRA: a gate ~ N(0, 1) for every rank."""
    torch.manual_seed(seed)
    sora.gated(model)


def soft_gate_adam(layers: Sequence[AdaptedLayer], lr: float) -> torch.optim.Adam:
    """SoRA: every step takes xi off each gate. No L1 term beside it: the authors' suits losses near 1, not all here."""
    optimizer = slot_adam(layers, lr)
    sora.add_gate_steps(optimizer, sora.gates_of(layers), sora.SoraSettings(l1=0.0))
    return optimizer


def cut_closed_gates(model: PeftModel, layers: Sequence[AdaptedLayer], rank: int) -> dict[str, int]:
    """SoRA: what has a zero gate goes."""
    return sora.cut(model, layers)


def start_nested(model: PeftModel, layers: Sequence[AdaptedLayer], seed: int) -> None:
    """DyLoRA: nested factors, and a rank drawn for every step."""
    dylora.nest(model, seed=seed)


def cut_nested(model: PeftModel, layers: Sequence[AdaptedLayer], rank: int) -> dict[str, int]:
    """DyLoRA: the whole of what was trained."""
    slot: Any = layers[0].a
    dylora.truncate(model, slot.nested, rank)
    return {layer.name: rank for layer in layers}


def cut_at_one_threshold(model: PeftModel, layers: Sequence[AdaptedLayer], rank: int) -> dict[str, int]:
    """PARA: the largest singular triples of all updates, to the budget's parameters."""
    detach(model)
    return para.truncate(model, rank, "parameters")
