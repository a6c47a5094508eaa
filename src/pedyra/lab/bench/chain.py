"""What the benchmarks of growth train: a chain of linear layers, so that nothing but the adapters grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Size:
    """One point of an axis; `triples` is layers times rank."""

    layers: int = 36
    rank: int = 8
    width: int = 128
    length: int = 64
    batch: int = 4


class Chain(nn.Module):
    """x -> x + W_l x / layers, layer after layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size.width, size.width, bias=False) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x


def adapted_chain(size: Size) -> Any:
    """A chain with a LoRA on every layer."""
    torch.manual_seed(0)
    return get_peft_model(Chain(size), LoraConfig(r=size.rank, target_modules=r"layers\.\d+"))  # type: ignore[arg-type]
