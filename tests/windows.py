"""Rank settings, and an allocator of them, that these tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.config import RankConfig
from pedyra.pe_dyra.scored import Algorithm2, ScoredMethod

STEPS = 30
SCHEDULE: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 8, "moves": 3}
"""Of a run of `STEPS`."""


def forced(*, train_e: bool = True, **settings: Any) -> dict[str, Any]:
    """`config` and `method` of a run in which triples move whether or not it helps, and E learns, from 1."""
    method = ScoredMethod(policy=Algorithm2(), conserves=True, train_e=train_e)
    return {"config": RankConfig.scored(**{"min_rank": 1, **settings}), "method": method}


def trainable(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: Any, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), **{"lr": 0.01, **settings})


def allocate(model: Any, given: dict[str, Any], optimizer: Any = None, **settings: Any) -> RankAllocator:
    settings = {"total_steps": STEPS, **given, **settings}
    return RankAllocator(model, adamw(model) if optimizer is None else optimizer, **settings)


def inside(allocator: Any) -> Any:
    """The method in a run, where a test looks at more of it than its contract has."""
    return allocator.run
