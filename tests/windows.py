"""Rank settings, and an allocator of them, that these tests share."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pedyra.allocate.distributed import Average
from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lora.layer import AdaptedLayer
from pedyra.pe_dyra.method import PeDyra

STEPS = 30
SCHEDULE: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 8, "moves": 3}
"""Of a run of `STEPS`."""


def on_lora(**settings: Any) -> PeDyra:
    """PE-DyRA on LoRA's own start, without Eq. (2), at a conserved number of parameters, over most of the run."""
    defaults: dict[str, Any] = dict(interval=0.05, initial_warmup=0.0, final_warmup=0.25, moves=None, min_rank=0)
    return PeDyra.as_published(**{**defaults, "budget": "parameters", "start": "lora", "orth_weight": 0.0, **settings})


class Forced(PeDyra):
    """PE-DyRA whose E learns, from 1."""

    always_trains_e = True


def forced(kind: type[PeDyra] = Forced, *, train_e: bool = True, **settings: Any) -> dict[str, Any]:
    """The `config` of a run in which triples move whether or not it helps."""
    kind = kind if train_e else PeDyra
    return {"config": kind(**on_lora(**{"min_rank": 1, **settings}).to_dict())}


def run_of(layers: Sequence[AdaptedLayer]) -> Any:
    """A run of which scores see these layers alone."""
    return SimpleNamespace(model=nn.Module(), layers=layers, average=Average())


def trainable(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: Any, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), **{"lr": 0.01, **settings})


def allocate(model: Any, given: dict[str, Any], optimizer: Any = None, **settings: Any) -> RankAllocator:
    settings = {"total_steps": STEPS, **given, **settings}
    return RankAllocator(model, adamw(model) if optimizer is None else optimizer, **settings)


def take_step(allocator: RankAllocator) -> dict[str, Any] | None:
    """A step of a loop of one's own, whose gradients are complete; the record of an adjustment."""
    allocator.before_step()
    allocator.optimizer.step()
    allocator.optimizer.zero_grad()
    return allocator.after_step()


def holds_what_is_trained(optimizer: torch.optim.Optimizer, model: Any) -> bool:
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return sorted(held) == sorted(map(id, trainable(model)))


def inside(allocator: Any) -> Any:
    """The method in a run, where a test looks at more of it than its contract has."""
    return allocator.run
