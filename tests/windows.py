"""Rank settings that these tests share."""

from __future__ import annotations

from typing import Any

FORCED: dict[str, Any] = {"init": "orthogonal", "expand": "importance", "min_rank": 1, "train_e": True}
"""Triples move whether or not it helps, and E learns: every part of an adjustment is at work."""
SCHEDULE: dict[str, Any] = {"interval": 3, "initial_warmup": 2, "final_warmup": 8, "moves": 3}
"""Of a run of 30 steps."""
WINDOW: dict[str, Any] = {**SCHEDULE, **FORCED}
