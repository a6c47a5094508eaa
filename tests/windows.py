"""Rank settings that these tests share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pedyra.config import RankConfig
from pedyra.methods.pedyra.run import Pedyra
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.scored import Algorithm2, ScoredMethod

SCHEDULE: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 8, "moves": 3}
"""Of a run of 30 steps."""


def forced(*, train_e: bool = True, **settings: Any) -> dict[str, Any]:
    """`config` and `method` of a run in which triples move whether or not it helps, and E learns, from 1."""
    method = ScoredMethod(policy=Algorithm2(), conserves=True, train_e=train_e)
    return {"config": RankConfig.scored(**{"min_rank": 1, **settings}), "method": method}


def inside(allocator: Any) -> Any:
    """The method in a run, where a test looks at more of it than its contract has."""
    return allocator.run


def pedyra(**settings: Any) -> dict[str, Any]:
    """`config` and `method` of our default, with these fields of `RankConfig` and of what benches vary."""
    ours = {field.name for field in fields(Settings)}
    varied = Settings(**{name: value for name, value in settings.items() if name in ours})
    config = RankConfig(**{name: value for name, value in settings.items() if name not in ours})
    return {"config": config, "method": Pedyra(varied)}
