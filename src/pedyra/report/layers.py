"""Which layers a run adapts, and the names a reader knows them by: module type and depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: where it sits in the model and the rank it started with.

    `depth` is the number of its block, None outside of any block. `short_name` is type and depth, the full
    module path where these do not tell the layer from another.
    """

    name: str
    type: str
    depth: int | None
    rank: int
    short_name: str


def make_layers(rows: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Layers of the `name`, `type`, `depth`, `rank` rows of ranks.jsonl, in their order.

    The last part of a module path is a poor type in BERT, where three layers of a block are called "dense". If the
    recorded types put two layers at one place, the types are taken from the paths instead.
    """
    depths = [row["depth"] if _has_block(row["name"]) else None for row in rows]
    types = [row["type"] for row in rows]
    if len(set(zip(types, depths, strict=True))) < len(rows):
        types = _types_from_paths([row["name"] for row in rows])
    places = Counter(zip(types, depths, strict=True))
    return [
        Layer(row["name"], kind, depth, row["rank"], _short_name(row["name"], kind, depth, places[kind, depth]))
        for row, kind, depth in zip(rows, types, depths, strict=True)
    ]


def rows_of_ranks(ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows of a run that logged ranks but no description of its layers."""
    return [
        {
            "name": name,
            "type": name.rsplit(".", 1)[-1],
            "depth": next((int(part) for part in name.split(".") if part.isdigit()), 0),
            "rank": rank,
        }
        for name, rank in ranks.items()
    ]


def _has_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _types_from_paths(names: Sequence[str]) -> list[str]:
    """The path inside the block, cut to the shortest tail that no other kind of layer is called by."""
    inside = [_inside_block(name.split(".")) for name in names]
    tails = Counter(tail for kind in set(inside) for tail in _tails(kind))
    return [".".join(next((tail for tail in _tails(kind) if tails[tail] == 1), kind)) for kind in inside]


def _inside_block(parts: Sequence[str]) -> tuple[str, ...]:
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return tuple(part for part in parts[first + 1 :] if not part.isdigit())


def _tails(kind: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [kind[start:] for start in range(len(kind) - 1, -1, -1)]


def _short_name(name: str, kind: str, depth: int | None, sharing: int) -> str:
    if sharing > 1:
        return name
    return kind if depth is None else f"{kind} {depth}"
