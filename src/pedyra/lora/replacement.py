"""Drop and append triples of one layer: always new Parameters, never `p.data = ...`, which breaks autograd and DDP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pedyra.lora.factors import AFactor, successor
from pedyra.lora.layer import AdaptedLayer
from pedyra.lora.start import follow


@dataclass(frozen=True)
class Replacement:
    """A new factor has the rows `indices` of the old one along `dim`, then `num_new` new rows."""

    old: Tensor
    new: Tensor
    dim: int
    indices: Tensor
    num_new: int
    divisor: float = 1.0
    """The old rows were divided by it, so that their gradients are so many times as large."""


class NewTriples(NamedTuple):
    """Triples to append: A `(n, in)`, E `(n,)` (longer where E is no diagonal), B `(out, n)`."""

    A: Tensor
    E: Tensor
    B: Tensor


@torch.no_grad()
def replacements_of(layer: AdaptedLayer, pruned: Sequence[int], new: NewTriples | None) -> list[Replacement]:
    """Compute the three factors of the layer without `pruned` and with `new`, B for the scaling at the new rank; the
    layer itself stays as it is."""
    removed_rows = set(pruned)
    assert not removed_rows or layer.a.E.shape == (layer.rank,), "an E that is no diagonal can only grow"
    replacements = []
    rank = layer.rank - len(removed_rows) + (0 if new is None else new.B.shape[1])
    divisors = 1.0, 1.0, layer.share_at(rank) / layer.share_at(layer.rank)
    for old, dim, new_rows, divisor in zip(layer.factors, (0, 0, 1), new or (None,) * 3, divisors, strict=True):
        remaining = [index for index in range(old.shape[dim]) if index not in removed_rows]
        indices = torch.tensor(remaining, dtype=torch.long, device=old.device)
        num_new = 0 if new_rows is None else new_rows.shape[dim]
        value = select_rows(old.detach() / divisor, dim, indices, num_new, new_rows)
        replacements.append(Replacement(old, successor(old, value), dim, indices, num_new, divisor))
    return replacements


def select_rows(value: Tensor, dim: int, indices: Tensor, num_new: int = 0, new: Tensor | None = None) -> Tensor:
    """Take rows `indices` of `value` along `dim`, then `num_new` rows: `new`, or zeros."""
    rows = value.index_select(dim, indices)
    if not num_new:
        return rows
    shape = [*rows.shape[:dim], num_new, *rows.shape[dim + 1 :]]
    return torch.cat([rows, rows.new_zeros(shape) if new is None else new.to(rows)], dim)


def put_replacements(changes: Iterable[tuple[AdaptedLayer, Sequence[Replacement]]]) -> None:
    """Put the new factors into each layer's slots; `write_ranks` then brings PEFT's config in line. Where the start
    took a part of the weight (PiSSA), the initial value of a pruned triple returns to the base weight."""
    changes = list(changes)
    put_factors((layer, [each.new for each in replacements]) for layer, replacements in changes)
    for layer, (of_A, _, _) in changes:
        follow(layer, of_A.indices, of_A.num_new)


def put_factors(factors: Iterable[tuple[AdaptedLayer, Sequence[Tensor]]]) -> None:
    """Put A, E and B into each layer's slots."""
    unit_scales: dict[AFactor, Tensor] = {}
    for layer, (A, E, B) in factors:
        layer.a.replace(A, E)  # type: ignore[arg-type]
        layer.b.weight = B  # type: ignore[assignment]
        if layer.a.e_fixed_at_one:
            unit_scales[layer.a] = (E == 1).all()
    at_one = torch.stack([*unit_scales.values()]).tolist() if unit_scales else []  # the host waits once for all layers
    for factor, fixed in zip(unit_scales, at_one, strict=True):
        factor.e_fixed_at_one = fixed
