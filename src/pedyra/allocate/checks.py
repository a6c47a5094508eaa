"""What is asked of a run's settings, and what an adjustment may do at most: moves, and ranks of a layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from pedyra.allocate.contract import Situation
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer


def checked_config(config: object) -> RankConfig:
    """The config itself; ValueError where it is something else, such as a dict of settings."""
    if not isinstance(config, RankConfig):
        raise ValueError(f"config is {config!r}, no RankConfig; write RankConfig(...), or RankConfig.from_dict")
    return config


def checked_steps(total_steps: object) -> int:
    """Optimizer steps of a run as an int, of any kind of whole number; ValueError for others."""
    try:
        return operator.index(total_steps)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"total_steps is {total_steps!r}; it is a whole number of optimizer steps") from None


def max_ranks(layers: Sequence[AdaptedLayer], config: RankConfig) -> dict[str, int]:
    """Layer -> the rank it may grow to: `config.max_rank`, and no more than its width.

    A start above the width is allowed, as in PEFT; such a layer does not grow.

    Raises:
        ValueError: a layer starts above `config.max_rank`.
    """
    result = {}
    for layer in layers:
        widest = max(layer.rank, min(layer.a.in_features, layer.b.out_features))
        result[layer.name] = widest if config.max_rank is None else min(config.max_rank, widest)
        if layer.rank > result[layer.name]:
            raise ValueError(
                f"rank.max_rank is {config.max_rank}, but {layer.name} starts at rank {layer.rank}; raise max_rank"
            )
    return result


def check_room(layers: Sequence[AdaptedLayer], config: RankConfig) -> None:
    """At one budget no rank can change where every layer starts at `max_rank`: ValueError."""
    if config.max_rank is not None and config.moves != 0 and all(layer.rank == config.max_rank for layer in layers):
        raise ValueError(
            f"no rank can change: every layer starts at rank.max_rank, {config.max_rank}; raise it, or lower lora.r"
        )


def check_movable(start: Situation) -> None:
    """PE-DyRA moves triples, so some layer must have one to spare: ValueError where none has."""
    highest = max(start.ranks.values())
    if start.moves and highest <= start.min_rank:
        raise ValueError(
            f"nothing can move: every layer starts at rank {highest} and rank.min_rank is {start.min_rank}; raise "
            f"lora.r or lower rank.min_rank"
        )
