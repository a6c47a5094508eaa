"""Ranks that are fixed from the start: by layer, by type of layer, or by what a look found them worth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

Costs = Mapping[str, int]
"""Layer name -> parameters of one rank, in the model's order."""
Gains = Mapping[str, Sequence[float]]
"""Layer name -> gain of each candidate direction, best first."""
Pattern = Callable[[Costs, int, Gains], dict[str, int]]
"""(costs, uniform rank, gains) -> rank of every layer; the gains are empty without a look."""


def spread(kinds: Sequence[str], costs: Costs, rank: int, gains: Gains) -> dict[str, int]:
    """The budget of a uniform `rank`, dealt out one rank at a time to the layers of these types; none to others."""
    chosen = [name for name in costs if any(_matches(name, kind) for kind in kinds)]
    for kind in kinds:
        if not any(_matches(name, kind) for name in costs):
            raise ValueError(f"only: no layer is called {kind!r}; the layers are {_kinds(costs)}")
    ranks, left = dict.fromkeys(costs, 0), rank * sum(costs.values())
    while any(costs[name] <= left for name in chosen):
        for name in chosen:
            if costs[name] <= left:
                ranks[name] += 1
                left -= costs[name]
    return ranks


def fixed(wanted: Mapping[str, int], costs: Costs, rank: int, gains: Gains) -> dict[str, int]:
    """The rank that `wanted` has for a layer's type or full name, the longest key first; `rank` for other layers."""
    for key in wanted:
        if not any(_matches(name, key) for name in costs):
            raise ValueError(f"static: no layer is called {key!r}; the layers are {_kinds(costs)}")
    ranks = {}
    for name in costs:
        keys = [key for key in wanted if _matches(name, key)]
        ranks[name] = wanted[max(keys, key=len)] if keys else rank
    return ranks


def by_gain(costs: Costs, rank: int, gains: Gains, min_rank: int = 0, *, per_parameter: bool = True) -> dict[str, int]:
    """The budget of a uniform `rank` for what has the highest gain, or the highest per parameter."""
    candidates = sorted(
        (-gain / (costs[name] if per_parameter else 1), position, index, name)
        for position, name in enumerate(costs)
        for index, gain in enumerate(gains[name][min_rank:])
    )
    ranks, left = dict.fromkeys(costs, min_rank), (rank - min_rank) * sum(costs.values())
    for *_, name in candidates:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _matches(name: str, key: str) -> bool:
    return name == key or name.endswith("." + key)


def _kinds(costs: Costs) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in costs))


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """name=value pairs with values as in YAML, and 1e-3 as a number."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"setting {pair!r} is not of the form name=value")
        value = yaml.safe_load(text)
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value, re.IGNORECASE):
            value = float(value)
        settings[key.strip()] = value
    return settings


def parse_ranks(text: str) -> dict[str, int]:
    """ "q=1,blocks.3.up=2" -> {"q": 1, "blocks.3.up": 2}."""
    ranks = parse_settings(text.split(","))
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"static: the rank of {key!r} is {rank!r}; it must be an integer of at least 0")
    return ranks
