"""Rank settings that these tests share."""

from __future__ import annotations

from typing import Any

from pedyra.config import RankConfig
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
