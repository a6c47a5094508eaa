"""Drop and append triples of one layer: always new Parameters, never `p.data = ...`, which breaks autograd and DDP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pedyra.lora.attach import AdaptedLayer
from pedyra.lora.factors import AFactor
from pedyra.lora.saved import renewed


@dataclass(frozen=True)
class Replacement:
    """An old factor and its successor: rows `kept` of the old along `dim`, then `num_new` new ones."""

    old: Tensor
    new: Tensor
    dim: int
    kept: Tensor
    num_new: int


@dataclass(frozen=True)
class NewTriples:
    """Triples to append: A `(n, in)`, E `(n,)` (longer where E is no diagonal), B `(out, n)`."""

    A: Tensor
    E: Tensor
    B: Tensor


@torch.no_grad()
def resized(layer: AdaptedLayer, pruned: Sequence[int], new: NewTriples | None) -> list[Replacement]:
    """The three factors the layer would have without `pruned` and with `new`; the layer itself is not touched."""
    gone = set(pruned)
    assert not gone or layer.a.E.shape == (layer.rank,), "an E that is no diagonal can only grow"
    parts: tuple[tuple[Tensor, int, Tensor | None], ...] = (
        (layer.a.A, 0, new and new.A),
        (layer.a.E, 0, new and new.E),
        (layer.b.weight, 1, new and new.B),
    )
    replacements = []
    rows = {n: _without(gone, n, layer.a.A.device) for n in {old.shape[dim] for old, dim, _ in parts}}
    for old, dim, added in parts:
        kept = rows[old.shape[dim]]
        value = old.detach().index_select(dim, kept)
        if added is not None:
            value = torch.cat([value, added.to(value)], dim)
        num_new = 0 if added is None else added.shape[dim]
        replacements.append(Replacement(old, renewed(old, value), dim, kept, num_new))
    return replacements


def _without(gone: set[int], count: int, device: torch.device) -> Tensor:
    return torch.tensor([i for i in range(count) if i not in gone], dtype=torch.long, device=device)


def install(successors: Iterable[tuple[AdaptedLayer, Sequence[Any]]]) -> None:
    """Put A, E and B into each layer's slots; `write_ranks` then brings PEFT's config in line."""
    units: dict[AFactor, Tensor] = {}
    for layer, (A, E, B) in successors:
        layer.a.A, layer.a.E, layer.b.weight = A, E, B
        if layer.a.unit:
            units[layer.a] = (E == 1).all()
    still = torch.stack([*units.values()]).tolist() if units else []  # the host waits once for all layers
    for factor, unit in zip(units, still, strict=True):
        factor.unit = unit
